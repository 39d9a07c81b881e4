"""Typical bugs of a flow's sampler, for an exercise of flow_matching.ipynb."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.protocols import Denoiser
from lesson_06_miniglide.flow.rectified_flow import nearest_timestep
from lesson_06_miniglide.flow.solutions import euler

BuggySampler = Callable[[Denoiser, Tensor, int], Tensor]  # (denoiser, x_T, steps) -> samples


def with_bug(time_fn: Callable[[Tensor, int], Tensor] = lambda t, steps: t, sign: int = 1) -> BuggySampler:
    """Return Euler's sampler with a bug. time_fn: (timestep, steps) -> the timestep that the network gets."""

    @torch.no_grad()
    def sample(denoiser: Denoiser, x_T: Tensor, steps: int) -> Tensor:
        def velocity(x: Tensor, tau: Tensor) -> Tensor:
            t = time_fn(nearest_timestep(tau), steps)
            return sign * denoiser(x, t.expand(len(x)))

        return euler(velocity, x_T, torch.linspace(1, 0, steps + 1))

    return sample


def buggy_samplers() -> dict[str, BuggySampler]:
    """Return four samplers by letter: one is correct, and three have one bug each."""
    return {
        "A": with_bug(lambda t, steps: (t - 1000 // steps).clamp(min=0)),  # the time at the end of the step
        "B": with_bug(sign=-1),
        "C": with_bug(),
        "D": with_bug(lambda t, steps: ((t + 1) / 1000).round().long()),  # tau itself, not 1000 tau - 1
    }
