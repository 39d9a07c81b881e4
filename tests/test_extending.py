"""A reader's own lesson seven, flow matching from public pieces in 60 lines: do the protocols suffice?"""

# -- lesson seven begins -------------------------------------------------------------------------------------
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from common import protocols
from common.digits.captions import CAPTIONS, WORDS
from common.digits.mnist import Digits, load_digits
from common.training.config import TrainConfig
from common.training.train import train
from lesson_04_text_conditioning.captioned_mnist import TokenizedDigits, train_tokenizer
from lesson_04_text_conditioning.model import UNET_CONFIG
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_05_cfg.guidance import caption_loss, cfg_denoiser, drop_captions
from lesson_05_cfg.pipeline import TextToImagePipeline

T = 1000


class RectifiedFlow:
    """x_t = (1 - s) x_0 + s noise with s = (t + 1) / T; networks predict noise - x_0 (Liu et al. 2023)."""

    def __init__(self, timesteps: Tensor):
        self.timesteps, self.s, self.num_timesteps = timesteps, (timesteps + 1) / T, len(timesteps)

    def respace_evenly(self, num_steps: int) -> "RectifiedFlow":
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"cannot take {num_steps} of {self.num_timesteps} timesteps")
        return RectifiedFlow(self.timesteps[torch.linspace(-1, T - 1, num_steps + 1).round().long()[1:]])

    def predict(self, denoiser: protocols.Denoiser, x_t: Tensor, t: Tensor) -> Tensor:
        return denoiser(x_t, self.timesteps[t.cpu()].to(x_t.device)).float()


def loss_flow(flow: RectifiedFlow, denoiser: protocols.Denoiser, x_0: Tensor, t: Tensor, noise: Tensor):
    s = flow.s[t].to(x_0.device).view(-1, 1, 1, 1)
    velocity = flow.predict(denoiser, (1 - s) * x_0 + s * noise, t)
    return (velocity - (noise - x_0)).square().flatten(1).mean(1)


@torch.no_grad()
def euler_sample(flow, denoiser, x_T, generator=None) -> Iterator[protocols.SamplerStep]:
    x_t, s = x_T, [0.0, *flow.s.tolist()]
    for i in reversed(range(flow.num_timesteps)):
        velocity = flow.predict(denoiser, x_t, torch.full((len(x_t),), i))
        x_prev = x_t - (s[i + 1] - s[i]) * velocity
        yield protocols.SamplerStep(i, x_t, x_t - s[i + 1] * velocity, x_prev)
        x_t = x_prev


def train_flow(digits: Digits, steps: int) -> TextToImagePipeline:
    flow, tokenizer = RectifiedFlow(torch.arange(T)), train_tokenizer()
    config = replace(UNET_CONFIG, out_channels=3, channel_mult=(0.5, 1, 1), attention_resolutions=(8,))
    network = TextUNet(config, TextConfig(tokenizer.vocab_size, tokenizer.context_length))
    loss = caption_loss(loss_flow, flow, partial(drop_captions, probability=0.1))
    settings = TrainConfig(steps=steps, batch_size=8, learning_rate=3e-3, device="cpu")
    network = train(network, loss, TokenizedDigits(digits, tokenizer), settings)
    return TextToImagePipeline(protocols.Model(network, flow, {}), tokenizer)


# -- lesson seven ends ---------------------------------------------------------------------------------------

FLOW = RectifiedFlow(torch.arange(T))


@pytest.fixture(scope="module")
def digits():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.digits.mnist.NUM_SYNTHETIC", 100)
        return load_digits("synthetic")


@pytest.fixture(scope="module")
def pipe(digits):
    return train_flow(digits, steps=30)


def test_lesson_seven_has_at_most_60_lines():
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    begin, end = (
        next(i for i, x in enumerate(lines) if f"# -- lesson seven {w}" in x) for w in ("begins", "ends")
    )
    assert 40 < sum(bool(line.strip()) for line in lines[begin + 1 : end]) <= 60


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
        *_, last = euler_sample(FLOW.respace_evenly(steps), gaussian_velocity(mean, std), x_T)
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
