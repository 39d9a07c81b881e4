"""Classifier-free guidance: the two identities, the formula, what is not guided, who loses the caption."""

from typing import NamedTuple

import pytest
import torch

from common.captions import CAPTIONS
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_05_cfg.guidance import drop_captions, guided


class Number(NamedTuple):
    value: torch.Tensor


class Network:
    """eps = value x, v = 10 value; counts the samples of each call."""

    def __init__(self):
        self.calls = []

    def __call__(self, x_t, t, text):
        self.calls.append(len(x_t))
        assert len(t) == len(x_t) == len(text.value)
        value = text.value.view(-1, 1, 1, 1)
        return torch.cat([value * x_t, 10 * value.expand_as(x_t)], 1)


X_T, T = torch.randn(4, 3, 2, 2), torch.tensor([1, 2, 3, 4])
TEXT, EMPTY = Number(torch.tensor([2.0, 3.0, 4.0, 5.0])), Number(torch.full((4,), 0.5))


@pytest.mark.parametrize("scale, alone", [(0, EMPTY), (1, TEXT)])
def test_scales_0_and_1_are_the_two_branches_for_the_price_of_one(scale, alone):
    network = Network()
    output = guided(network, TEXT, EMPTY, scale)(X_T, T)
    assert network.calls == [4]
    assert torch.equal(output, network(X_T, T, alone))


@pytest.mark.parametrize("scale", [0.5, 2, 7.5])
def test_other_scales_are_one_call_of_twice_the_batch(scale):
    network = Network()
    output = guided(network, TEXT, EMPTY, scale)(X_T, T)
    assert network.calls == [8]
    value = (EMPTY.value + scale * (TEXT.value - EMPTY.value)).view(-1, 1, 1, 1)
    torch.testing.assert_close(output[:, :3], value * X_T)
    torch.testing.assert_close(output[:, 3:], network(X_T, T, TEXT)[:, 3:])  # the variance is not guided


def test_guidance_is_continuous_where_the_calls_change():
    for scale in (0, 1):
        near = guided(Network(), TEXT, EMPTY, scale + 1e-6)(X_T, T)[:, :3]
        torch.testing.assert_close(
            near, guided(Network(), TEXT, EMPTY, scale)(X_T, T)[:, :3], rtol=0, atol=1e-4
        )


def test_captions_are_dropped_sample_by_sample_at_the_given_rate():
    torch.manual_seed(0)
    mask = torch.ones(20_000, 5, dtype=torch.bool)
    dropped = drop_captions(mask, 0.1)
    kept_tokens = dropped.sum(1)
    assert set(kept_tokens.tolist()) == {0, 5}  # whole captions or nothing
    assert (kept_tokens == 0).float().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / 20_000) ** 0.5)
    assert drop_captions(mask, 0.0).all() and not drop_captions(mask, 1.0).any()


def test_a_dropped_caption_is_the_empty_caption():
    tokenizer = CaptionTokenizer.train(CAPTIONS)
    tokens, mask = tokenizer.encode([""])
    assert not mask.any() and (tokens == tokenizer.padding_id).all()
    assert torch.equal(drop_captions(tokenizer.encode(["a red seven"])[1], 1.0), mask)
