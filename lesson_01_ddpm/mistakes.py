"""The classic bugs of lesson 1. None of them crashes; `experiments.py mistakes` shows what each does."""

import copy
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.device import pick_device
from common.protocols import Denoiser, Loss, Sampler, SamplerStep
from common.sampling import last_sample
from lesson_01_ddpm.diffusion import (
    GaussianDiffusion,
    ddpm_sample,
    fixed_small,
    gaussian_noise,
    loss_simple,
    squared_error,
)
from lesson_01_ddpm.model import make_diffusion


def loss_unscaled(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n"]:
    """Return L_simple of images in [0, 1], for each sample. The bug: noise schedules assume [-1, 1]."""
    x_t = diffusion.q_sample((x_0 + 1) / 2, t, noise)
    return squared_error(diffusion.predict(denoiser, x_t, t), noise)


def without_t(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser that is always evaluated at t = 500. The bug: t is not passed on."""
    return lambda x_t, t: denoiser(x_t, torch.full_like(t, 500))


def loss_without_t(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n"]:
    """Return L_simple of a denoiser that is not given t, for each sample."""
    return loss_simple(diffusion, without_t(denoiser), x_0, t, noise)


def with_next_t(denoiser: Denoiser) -> Denoiser:
    """Return a denoiser that is evaluated at t + 1. The bug: the paper counts from 1, the code from 0."""
    return lambda x_t, t: denoiser(x_t, (t + 1).clamp(max=999))


def sample_with_final_noise(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
) -> Iterator[SamplerStep]:
    """Sample ancestrally and add noise of variance beta in the last step, too. The bug: it adds none."""
    for step in ddpm_sample(diffusion, denoiser, x_T, generator):
        if step.t == 0:
            noise = diffusion.betas[0].item() ** 0.5 * gaussian_noise(step.x_prev, generator)
            step = step._replace(x_prev=step.x_prev + noise)
        yield step


def twice_the_noise(
    diffusion: GaussianDiffusion, output: Tensor, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]
) -> Float[Tensor, "n 1 1 1"]:
    """Return a log variance. The bug: its noise is twice as strong as that of `fixed_small`."""
    return fixed_small(diffusion, output, x_t, t) + math.log(4)


def no_noise(
    diffusion: GaussianDiffusion, output: Tensor, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]
) -> Float[Tensor, "n 1 1 1"]:
    """Return the log of a variance of 0. The bug: a reverse step without noise."""
    return torch.full_like(fixed_small(diffusion, output, x_t, t), -math.inf)


def buggy_samples(
    network: Denoiser, n: int = 12, steps: int = 100
) -> dict[str, Float[Tensor, "{n} 1 32 32"]]:
    """Return samples of four samplers, all from the same noise, for exercise 1.9."""
    variants: dict[str, tuple[Sampler, Denoiser]] = {
        "t is always 500": (ddpm_sample, without_t(network)),
        "no noise": (partial(ddpm_sample, log_variance_fn=no_noise), network),
        "too much noise": (partial(ddpm_sample, log_variance_fn=twice_the_noise), network),
        "correct": (ddpm_sample, network),
    }
    process, samples = make_diffusion().respace_evenly(steps), {}
    for name, (sampler, denoiser) in variants.items():
        generator = torch.Generator().manual_seed(1)
        x_T = torch.randn(n, 1, 32, 32, generator=generator)
        samples[name] = last_sample(sampler(process, denoiser, x_T, generator))
    return samples


class AveragingLoss(nn.Module):
    """A training loss that also averages the weights of the network it is given, as EMA without warm-up.

    The bug: an average of decay d still holds d^n of the random initial weights after n steps. decays: one
    average each; 0 keeps the weights as they are. A resumed run continues the averages, because they are
    part of the module's state.
    """

    def __init__(self, loss: Loss, network: nn.Module, decays: Sequence[float], device: str):
        super().__init__()
        self.loss, self.decays = loss, decays
        self.averages = nn.ModuleList(copy.deepcopy(network) for _ in decays)
        self.to(pick_device(device))

    def forward(self, network: nn.Module, x_0: Tensor, label: Tensor) -> Float[Tensor, "n"]:
        if torch.is_grad_enabled():  # not for the validation loss
            weights = [p.data for p in network.parameters()]
            for decay, average in zip(self.decays, self.averages):
                torch._foreach_lerp_([p.data for p in average.parameters()], weights, 1 - decay)
        return self.loss(network, x_0, label)
