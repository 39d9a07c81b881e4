"""One right answer for each exercise of flow_matching.ipynb."""

from collections.abc import Callable
from itertools import pairwise

from torch import Tensor


def flow_loss(network: Callable, x_0: Tensor, tau: Tensor, noise: Tensor) -> Tensor:
    """Exercise 6.19: return the squared error of the velocity for images x_0 [N, C, H, W], tau [N]."""
    w = tau.view(-1, 1, 1, 1)
    x_tau = (1 - w) * x_0 + w * noise
    return (network(x_tau, tau) - (noise - x_0)).square().mean((1, 2, 3))


def euler(velocity: Callable, x: Tensor, times: Tensor) -> Tensor:
    """Exercise 6.20: follow the velocity from times[0] to times[-1] in Euler steps."""
    for tau, tau_next in pairwise(times):
        x = x + (tau_next - tau) * velocity(x, tau)
    return x


def flow_from_diffusion(x_t: Tensor, eps_hat: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exercise 6.22: return tau, x_tau and the velocity of the flow that fit x_t and its predicted noise."""
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    x_0 = (x_t - sigma * eps_hat) / alpha
    return sigma / (alpha + sigma), x_t / (alpha + sigma), eps_hat - x_0
