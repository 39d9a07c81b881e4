"""Flow matching, built from public pieces: do the protocols suffice for a process that no lesson had?"""

import ast
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from common import protocols
from common.digits.captions import CAPTIONS, WORDS
from common.digits.mnist import Digits, load_digits
from common.files import ROOT
from common.training.config import TrainConfig
from common.training.train import train
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.captioned_mnist import TokenizedDigits, train_tokenizer
from lesson_05_cfg.guidance import caption_loss, cfg_denoiser, drop_captions
from lesson_06_miniglide.flow.mistakes import buggy_samplers
from lesson_06_miniglide.flow.rectified_flow import (
    FLOW_CONFIG,
    FlowAsDiffusion,
    FlowPipeline,
    RectifiedFlow,
    T,
    build_model,
    euler_sample,
    loss_flow,
)


def train_flow(digits: Digits, steps: int) -> FlowPipeline:
    tokenizer = train_tokenizer()
    config = replace(FLOW_CONFIG, channel_mult=(0.5, 1, 1), attention_resolutions=(8,))
    network, flow, metadata = build_model(tokenizer, config)
    loss = caption_loss(loss_flow, flow, partial(drop_captions, probability=0.1))
    settings = TrainConfig(steps=steps, batch_size=8, learning_rate=3e-3, device="cpu")
    network = train(network, loss, TokenizedDigits(digits, tokenizer), settings)
    return FlowPipeline(protocols.Model(network, flow, metadata), tokenizer)


FLOW = RectifiedFlow(torch.arange(T))
PARTS = ("RectifiedFlow", "loss_flow", "euler_sample")


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.digits.mnist.NUM_SYNTHETIC", 100)
        return load_digits("synthetic")


@pytest.fixture(scope="module")
def pipe(digits):
    return train_flow(digits, steps=30)


def test_flow_matching_needs_at_most_60_lines_of_code():
    source = (ROOT / "lesson_06_miniglide/flow/rectified_flow.py").read_text(encoding="utf-8")
    parts = [n for n in ast.parse(source).body if getattr(n, "name", "") in PARTS]
    for node in (node for part in parts for node in ast.walk(part)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
            node.body = node.body[1:]
    lines = sum(len(ast.unparse(part).splitlines()) for part in parts)
    assert len(parts) == len(PARTS) and 25 < lines <= 60


def test_its_parts_keep_the_protocols(digits, pipe):
    data = TokenizedDigits(digits, pipe.tokenizer)
    loss = caption_loss(loss_flow, FLOW, lambda mask: mask)
    for part, protocol in (
        (FLOW, protocols.Process),
        (FLOW.respace_evenly(10), protocols.Process),
        (euler_sample, protocols.Sampler),
        (loss, protocols.Loss),
        (data, protocols.Dataset),
        (data, protocols.CaptionedDataset),
        (cfg_denoiser(lambda x_t, t, c: x_t, torch.zeros(2), torch.zeros(2), 3), protocols.Denoiser),
    ):
        assert isinstance(part, protocol), (part, protocol)
    assert not isinstance(digits.images, protocols.Process) and not isinstance(FLOW, protocols.Dataset)


def gaussian_velocity(mean, std):
    """E[noise - x_0 | x_t] for data N(mean, std^2): noise - x_0 and x_t are jointly Gaussian."""

    def denoiser(x_t, t):
        s = ((t + 1) / T).view(-1, 1, 1, 1)
        covariance, variance = s - (1 - s) * std**2, (1 - s) ** 2 * std**2 + s**2
        return -mean + covariance / variance * (x_t - (1 - s) * mean)

    return denoiser


def test_the_exact_velocity_leads_to_the_data_distribution():
    """The solution of the ODE is x_0 = mean + std x_T, and Euler's error halves with the step."""
    mean, std = 0.4, 0.3
    x_T = torch.randn(20_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    error = {}
    for steps in (50, 100, 1000):
        flow, velocity = FLOW.respace_evenly(steps), gaussian_velocity(mean, std)
        *_, last = euler_sample(flow, velocity, x_T, denoised_fn=None)
        error[steps] = (last.x_prev - (mean + std * x_T)).square().mean().sqrt().item()
    assert error[50] / error[100] == pytest.approx(2, abs=0.2) and error[1000] < 2e-3
    assert last.x_prev.mean().item() == pytest.approx(mean, abs=4 * std / 20_000**0.5)
    assert last.x_prev.var().item() == pytest.approx(std**2, rel=4 * (2 / 20_000) ** 0.5)


def test_the_loss_is_zero_for_the_true_velocity_and_least_for_the_mean():
    x_0, noise, t = torch.rand(3, 3, 4, 4) * 2 - 1, torch.randn(3, 3, 4, 4), torch.tensor([0, 500, 999])
    assert not loss_flow(FLOW, lambda x_t, t: noise - x_0, x_0, t, noise).any()
    off_by_one = loss_flow(FLOW, lambda x_t, t: noise - x_0 + 1, x_0, t, noise)
    torch.testing.assert_close(off_by_one, torch.ones(3))
    x_t = (1 - 0.501) * x_0[1] + 0.501 * noise[1]
    seen = []
    loss_flow(FLOW, lambda x_t, t: seen.append((x_t, t)) or x_t, x_0, t, noise)
    assert seen[0][1].tolist() == t.tolist()
    torch.testing.assert_close(seen[0][0][1], x_t)


class ExactVelocity(nn.Module):
    """The exact velocity for N(0.4, 0.3^2), as a network."""

    def forward(self, x_t, t):
        return gaussian_velocity(0.4, 0.3)(x_t, t)


def test_a_flow_serves_as_a_diffusion_model():
    """For Gaussian data eps_hat is known. The network is asked at the nearest of 1,000 times, hence 0.01."""
    mean, std = 0.4, 0.3
    alpha_bar = make_diffusion().alpha_bar
    wrapped = FlowAsDiffusion(ExactVelocity(), alpha_bar)
    t = torch.tensor([50, 100, 500, 900, 999])
    a = alpha_bar[t].float().view(-1, 1, 1, 1)
    x_t = torch.linspace(-2, 2, 5).expand(5, 1, 1, 5)
    exact = (1 - a).sqrt() / (a * std**2 + 1 - a) * (x_t - a.sqrt() * mean)
    torch.testing.assert_close(wrapped(x_t, t), exact, rtol=0, atol=0.01)


def test_euler_on_the_flow_is_ddim():
    """DDIM visits the flow's times in other coordinates: divided by alpha + sigma, it is on Euler's path."""
    velocity, process = gaussian_velocity(0.4, 0.3), make_diffusion().respace_evenly(25)
    alpha, sigma = process.alpha_bar.sqrt(), (1 - process.alpha_bar).sqrt()
    scale, s = (alpha + sigma).tolist(), (sigma / (alpha + sigma)).tolist()
    wrapped = FlowAsDiffusion(ExactVelocity(), make_diffusion().alpha_bar)
    x_T = torch.randn(6, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x_s = x_T / scale[-1]
    for step in ddim_sample(process, wrapped, x_T, denoised_fn=None):
        torch.testing.assert_close(step.x_t / scale[step.t], x_s, rtol=0, atol=2e-3)
        t = torch.full((6,), max(0, round(T * s[step.t] - 1)))
        x_s = x_s - (s[step.t] - (s[step.t - 1] if step.t else 0)) * velocity(x_s, t)
    torch.testing.assert_close(step.x_prev, x_s, rtol=0, atol=2e-3)


def test_one_of_the_buggy_samplers_is_correct():
    x_T = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    velocity = gaussian_velocity(0.4, 0.3)
    *_, last = euler_sample(FLOW.respace_evenly(50), velocity, x_T, denoised_fn=None)
    change = {
        name: (sampler(velocity, x_T, 50) - last.x_prev).square().mean().sqrt().item()
        for name, sampler in buggy_samplers().items()
    }
    assert change["C"] < 1e-5 and 1e-3 < change["A"] < min(change["B"], change["D"])


def test_the_time_of_evaluation_shows_a_bug_that_gaussian_data_do_not():
    """Given the time at the end of each step, a sampler may be nearer to the result than a correct one."""
    x_T = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    error, asked = {}, {}
    for name, sampler in buggy_samplers().items():
        error[name] = (sampler(gaussian_velocity(0.4, 0.3), x_T, 10) - (0.4 + 0.3 * x_T)).abs().mean().item()
        asked[name] = times = []
        sampler(lambda x, t, times=times: times.append(int(t[0])) or x, x_T, 10)
    assert error["A"] < error["C"] < min(error["B"], error["D"])
    right = list(range(999, 0, -100))
    assert {name for name, times in asked.items() if times != right} == {"A", "D"}


def test_its_pipeline_draws_samples_with_and_without_guidance(pipe):
    prompts = ["a red seven", "a green 0"]
    for scale in (0, 1, 3):
        output = pipe(prompts, scale, steps=4, sampler=euler_sample, progress_bar=False)
        assert output.tensor.shape == (2, 3, 32, 32) and output.tensor.isfinite().all()
        assert [image.size for image in output.images] == [(32, 32)] * 2
    assert len(pipe.trajectory(prompts, steps=4, sampler=euler_sample)) == 4


def test_a_few_steps_of_training_beat_the_prediction_of_zero(digits, pipe):
    torch.manual_seed(0)
    x_0, tokens, mask = TokenizedDigits(digits, pipe.tokenizer).batch(torch.arange(64))
    losses = []

    def record(flow, denoiser, x_0, t, noise):
        losses.append((noise - x_0).square().mean().item())  # what a network that returns 0 has
        return loss_flow(flow, denoiser, x_0, t, noise)

    with torch.no_grad():
        loss = caption_loss(record, pipe.process, lambda mask: mask)(pipe.network, x_0, tokens, mask)
    assert loss.shape == (64,) and loss.mean().item() < 0.9 * losses[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_captioned_digits_work_in_a_data_loader(digits, workers):
    tokenizer = train_tokenizer()
    data = TokenizedDigits(digits, tokenizer)
    batches = list(DataLoader(data, batch_size=8, num_workers=workers))
    assert len(batches) == 13 and [len(batch[0]) for batch in batches] == [8] * 12 + [4]
    x_0, tokens, mask = (torch.cat(parts) for parts in zip(*batches))
    assert x_0.shape == (100, 3, 32, 32) and x_0.dtype == torch.float32
    assert tokens.shape == mask.shape == (100, 8) and tokens.dtype == torch.int64 and mask.dtype == torch.bool
    for i in range(100):
        torch.testing.assert_close(x_0[i].amax(0), digits.images[i, 0])  # the order of the data set
        caption = tokenizer.tokenizer.decode(tokens[i][mask[i]].tolist())
        label = int(digits.labels[i])
        assert caption in CAPTIONS and {WORDS[label], str(label)} & set(caption.split())
    with pytest.raises(IndexError):
        data[100]
