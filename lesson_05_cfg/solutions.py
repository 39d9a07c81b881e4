"""One correct answer for each exercise of lesson 5; the notebooks fall back on them."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def guide(cond: Tensor, uncond: Tensor, scale: float, channels: int) -> Tensor:
    """Exercise 5.1: return the guided output; the first `channels` are eps_hat, the others the variance."""
    eps = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
    return torch.cat([eps, cond[:, channels:]], 1)


def drop_captions(mask: Tensor, probability: float) -> Tensor:
    """Exercise 5.2: return the mask [N, L] with each caption dropped as a whole with this probability."""
    keep = torch.rand(len(mask)) >= probability
    return mask & keep[:, None]


def dynamic_threshold(x_0: Tensor, percentile: float = 99.5) -> Tensor:
    """Exercise 5.4: clip each image at a percentile of its |x_0|, at least 1, and divide by it."""
    a = x_0.abs().flatten(1).quantile(percentile / 100, dim=1).clamp(min=1)[:, None, None, None]
    return x_0.clamp(-a, a) / a


def exponential_step(x: Tensor, x_0: Tensor, start: Tensor, end: Tensor) -> Tensor:
    """Exercise 5.7: return x at lambda = end, from x at lambda = start and a constant predicted x_0."""
    sigma_start, sigma_end = (-2 * start).sigmoid().sqrt(), (-2 * end).sigmoid().sqrt()
    return sigma_end / sigma_start * x + sigma_end * (end.exp() - start.exp()) * x_0


def x_0_in_the_middle(x_0: Tensor, x_0_before: Tensor, h: Tensor, h_before: Tensor) -> Tensor:
    """Exercise 5.8: extrapolate the predicted x_0 by half a step of length h."""
    return x_0 + (x_0 - x_0_before) * h / (2 * h_before)


def dpm_solver(predict_x_0: Callable[[Tensor, int], Tensor], x: Tensor, lambdas: Tensor) -> Tensor:
    """Exercise 5.9: solve the ODE through all `lambdas` with DPM-Solver++(2M); return x at the last one."""
    h, x_0_before = lambdas.diff(), None
    for i in range(len(h)):
        x_0 = predict_x_0(x, i)
        x_0_middle = x_0 if x_0_before is None else x_0_in_the_middle(x_0, x_0_before, h[i], h[i - 1])
        x = exponential_step(x, x_0_middle, lambdas[i], lambdas[i + 1])
        x_0_before = x_0
    return x


def dpm_solver_final(predict_x_0: Callable[[Tensor, int], Tensor], x: Tensor, lambdas: Tensor) -> Tensor:
    """Exercise 5.10: solve the ODE like `dpm_solver`, with a last step of first order."""
    h, x_0_before = lambdas.diff(), None
    for i in range(len(h)):
        x_0 = predict_x_0(x, i)
        x_0_middle = x_0
        if x_0_before is not None and i < len(h) - 1:
            x_0_middle = x_0_in_the_middle(x_0, x_0_before, h[i], h[i - 1])
        x = exponential_step(x, x_0_middle, lambdas[i], lambdas[i + 1])
        x_0_before = x_0
    return x


def even_in_lambda(lambda_of_t: Tensor, n: int) -> list[int]:
    """Exercise 5.11: return increasing timesteps, the nearest ones to n even values of `lambda_of_t` [T]."""
    wanted = torch.linspace(lambda_of_t[-1], lambda_of_t[0], n, dtype=lambda_of_t.dtype)
    return sorted({(lambda_of_t - value).abs().argmin().item() for value in wanted})


def interval_denoiser(
    network: Callable[..., Tensor], cond: Any, uncond: Any, scale: float, low: int, high: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """Exercise 5.12: return a denoiser that is guided at low <= t <= high, and plain elsewhere."""

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        eps_cond = network(x_t, t, cond)
        if not low <= t[0] <= high:
            return eps_cond
        return guide(eps_cond, network(x_t, t, uncond), scale, x_t.shape[1])

    return denoiser
