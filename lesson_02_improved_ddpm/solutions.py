"""One correct answer for each exercise of improved_ddpm.ipynb; the notebook falls back on them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lesson_01_ddpm.diffusion import GaussianDiffusion, squared_error
from lesson_02_improved_ddpm.variational_bound import vb_terms_bpd


def cosine_betas(num_timesteps: int) -> Tensor:
    """Exercise 2.1: return the betas of the cosine schedule, float64 [T]."""
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    c = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - c[1:] / c[:-1]).clamp(max=0.999)


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """Exercise 2.2: return KL(N_1 || N_2) in nats, element by element."""
    ratio = log_variance_1 - log_variance_2
    return 0.5 * (ratio.exp() - 1 - ratio + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())


def learned_log_variance(v: Tensor, log_beta_tilde: Tensor, log_beta: Tensor) -> Tensor:
    """Exercise 2.3: return the log variance between its two limits."""
    f = (v + 1) / 2
    return f * log_beta + (1 - f) * log_beta_tilde


def loss_hybrid(
    diffusion: GaussianDiffusion, network: Callable, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Exercise 2.4: return L_hybrid of each image, [N]."""
    x_t = diffusion.q_sample(x_0, t, noise)
    output = network(x_t, t)
    eps_hat, v = output.chunk(2, 1)
    stopped = torch.cat([eps_hat.detach(), v], 1)
    bits = vb_terms_bpd(diffusion, stopped, x_0, x_t, t)
    return squared_error(eps_hat, noise) + 0.001 * diffusion.num_timesteps * bits


def respaced_betas(alpha_bar: Tensor, kept: Tensor) -> Tensor:
    """Exercise 2.5: return the betas of a process that visits only some timesteps."""
    alpha_bar = alpha_bar[kept]
    previous = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    return 1 - alpha_bar / previous


def ddim_step(x_0_hat: Tensor, eps_hat: Tensor, alpha_bar_prev: float) -> Tensor:
    """Exercise 2.6: return x at the next lower noise level."""
    return alpha_bar_prev**0.5 * x_0_hat + (1 - alpha_bar_prev) ** 0.5 * eps_hat
