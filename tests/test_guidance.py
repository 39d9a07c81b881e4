"""Classifier-free guidance: the formula, its two special scales, intervals, thresholds, caption dropout."""

from typing import NamedTuple

import numpy as np
import pytest
import torch

from common.digits.captions import CAPTIONS
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_05_cfg.guidance import cfg_denoiser, cfg_interval_denoiser, drop_captions, dynamic_threshold


class Condition(NamedTuple):
    value: torch.Tensor


class Network:
    """eps = value x_t, v = 10 value; counts the samples of each evaluation."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, condition):
        self.calls.append(len(x_t))
        assert len(t) == len(x_t) == len(condition.value)
        value = condition.value.view(-1, 1, 1, 1)
        return torch.cat([value * x_t, 10 * value.expand_as(x_t)], 1)


X_T, T = torch.randn(4, 3, 2, 2), torch.tensor([1, 2, 3, 4])
COND, UNCOND = Condition(torch.tensor([2.0, 3.0, 4.0, 5.0])), Condition(torch.full((4,), 0.5))


@pytest.mark.parametrize("scale, alone", [(0, UNCOND), (1, COND)])
def test_scales_0_and_1_are_one_branch_in_one_evaluation(scale, alone):
    network = Network()
    output = cfg_denoiser(network, COND, UNCOND, scale)(X_T, T)
    assert network.calls == [4]
    assert torch.equal(output, network(X_T, T, alone))


@pytest.mark.parametrize("scale", [0.5, 2, 7.5])
def test_other_scales_are_one_evaluation_of_twice_the_batch(scale):
    network = Network()
    output = cfg_denoiser(network, COND, UNCOND, scale)(X_T, T)
    assert network.calls == [8]
    value = (UNCOND.value + scale * (COND.value - UNCOND.value)).view(-1, 1, 1, 1)
    torch.testing.assert_close(output[:, :3], value * X_T)
    torch.testing.assert_close(output[:, 3:], network(X_T, T, COND)[:, 3:])  # the variance is not guided


def test_guidance_is_continuous_where_the_evaluations_change():
    for scale in (0, 1):
        near = cfg_denoiser(Network(), COND, UNCOND, scale + 1e-6)(X_T, T)[:, :3]
        torch.testing.assert_close(
            near, cfg_denoiser(Network(), COND, UNCOND, scale)(X_T, T)[:, :3], rtol=0, atol=1e-4
        )


def test_captions_are_dropped_independently_at_the_given_rate():
    torch.manual_seed(0)
    mask = torch.ones(20_000, 5, dtype=torch.bool)
    dropped = drop_captions(mask, 0.1)
    kept_tokens = dropped.sum(1)
    assert set(kept_tokens.tolist()) == {0, 5}  # a whole caption or nothing
    assert (kept_tokens == 0).float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / 20_000) ** 0.5)
    assert drop_captions(mask, 0.0).all() and not drop_captions(mask, 1.0).any()


def test_a_dropped_caption_is_the_empty_caption():
    tokenizer = CaptionTokenizer.train(CAPTIONS)
    tokens, mask = tokenizer.encode([""])
    assert not mask.any() and (tokens == tokenizer.padding_id).all()
    assert torch.equal(drop_captions(tokenizer.encode(["a red seven"])[1], 1.0), mask)


def test_guidance_in_an_interval_costs_and_acts_only_there():
    network = Network()
    denoiser = cfg_interval_denoiser(network, COND, UNCOND, 3, interval=(200, 600))
    for t, calls, scale in ((199, 4, 1), (200, 8, 3), (600, 8, 3), (601, 4, 1)):
        network.calls.clear()
        t = torch.full((4,), t)
        output = denoiser(X_T, t)
        assert network.calls == [calls]
        assert torch.equal(output, cfg_denoiser(network, COND, UNCOND, scale)(X_T, t))


def test_dynamic_threshold_by_numpy():
    torch.manual_seed(0)
    x_0 = torch.randn(3, 3, 32, 32) * torch.tensor([0.2, 1.0, 5.0]).view(3, 1, 1, 1)
    ours = dynamic_threshold(x_0)
    for sample, result in zip(x_0.numpy(), ours.numpy()):
        s = max(1.0, np.percentile(np.abs(sample), 99.5))
        np.testing.assert_allclose(result, np.clip(sample, -s, s) / s, rtol=1e-5)
    assert torch.equal(ours[0], x_0[0])  # in range: unchanged
    assert ours.abs().max() <= 1 and (ours[2].abs() == 1).float().mean().item() == pytest.approx(
        0.005, abs=2e-3
    )
    alone = dynamic_threshold(x_0[1:2])
    assert torch.equal(alone[0], ours[1])  # independent of the batch
