"""Typical bugs of a flow's sampler, for an exercise of flow_matching.ipynb."""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from common.protocols import Denoiser

BuggySampler = Callable[[Denoiser, Tensor, int], Tensor]  # (denoiser, x_T, steps) -> samples


@torch.no_grad()
def follow(
    denoiser: Denoiser,
    x: Float[Tensor, "n c h w"],
    steps: int,
    time_fn: Callable[[float, float], float],
    sign: int = 1,
) -> Float[Tensor, "n c h w"]:
    """Take Euler steps from tau = 1 to 0. time_fn: (tau, next tau) -> the timestep that the network gets."""
    for i in range(steps, 0, -1):
        t = max(0, round(time_fn(i / steps, (i - 1) / steps)))
        x = x - sign / steps * denoiser(x, torch.full((len(x),), t))
    return x


def buggy_samplers() -> dict[str, BuggySampler]:
    """Return four samplers by letter: one is correct, and three have one bug each."""

    def late(denoiser: Denoiser, x: Tensor, steps: int) -> Tensor:
        return follow(denoiser, x, steps, lambda tau, tau_next: 1000 * tau_next - 1)

    def backwards(denoiser: Denoiser, x: Tensor, steps: int) -> Tensor:
        return follow(denoiser, x, steps, lambda tau, tau_next: 1000 * tau - 1, sign=-1)

    def correct(denoiser: Denoiser, x: Tensor, steps: int) -> Tensor:
        return follow(denoiser, x, steps, lambda tau, tau_next: 1000 * tau - 1)

    def unscaled(denoiser: Denoiser, x: Tensor, steps: int) -> Tensor:
        return follow(denoiser, x, steps, lambda tau, tau_next: tau)

    return {"A": late, "B": backwards, "C": correct, "D": unscaled}
