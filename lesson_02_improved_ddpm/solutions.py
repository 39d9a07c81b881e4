"""One correct answer for each exercise of improved_ddpm.ipynb; the notebook falls back on them."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lesson_01_ddpm.diffusion import GaussianDiffusion, LogVarianceFn, squared_error
from lesson_02_improved_ddpm.variational_bound import discretized_nll_bits, vb_terms_bpd


def respaced_betas(alpha_bar: Tensor, kept: Tensor) -> Tensor:
    """Exercise 2.1: return the betas of a process that visits only some timesteps."""
    alpha_bar = alpha_bar[kept]
    previous = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
    return 1 - alpha_bar / previous


def cosine_betas(num_timesteps: int) -> Tensor:
    """Exercise 2.2: return the betas of the cosine schedule, float64 [T]."""
    s = torch.arange(num_timesteps + 1, dtype=torch.float64)
    g = torch.cos((s / num_timesteps + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - g[1:] / g[:-1]).clamp(max=0.999)


def best_variance(process: GaussianDiffusion, i: int, error: Tensor) -> Tensor:
    """Exercise 2.3: return the variance of x_{t-1} given x_t, if x_0_hat has this mean squared error."""
    c = process.alpha_bar_prev[i].sqrt() * process.betas[i] / (1 - process.alpha_bar[i])
    return process.beta_tilde[i] + c**2 * error


def normal_kl(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """Exercise 2.4: return KL(N_1 || N_2) in nats, element by element."""
    log_ratio = log_variance_1 - log_variance_2
    return 0.5 * (log_ratio.exp() - 1 - log_ratio + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())


def vlb_term(
    process: GaussianDiffusion,
    output: Tensor,
    x_0: Tensor,
    x_t: Tensor,
    i: int,
    log_variance_fn: LogVarianceFn,
) -> Tensor:
    """Exercise 2.5: return the term of the VLB at index i in bits, for each pixel, [N, C, H, W]."""
    t = torch.full((len(x_0),), i)
    p = process.p_mean_variance(output, x_t, t, log_variance_fn)
    if i == 0:
        return discretized_nll_bits(x_0, p.mean, p.log_variance)
    q_mean = process.q_posterior_mean(x_0, x_t, t)
    q_log_variance = process.extract(process.posterior_log_variance, t, x_t)
    return normal_kl(q_mean, q_log_variance, p.mean, p.log_variance) / math.log(2)


def learned_range(process: GaussianDiffusion, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Exercise 2.6: return the learned log variance, [N, 1, H, W]."""
    f = (output[:, 1:] + 1) / 2
    low = process.extract(process.posterior_log_variance, t, x_t)
    high = process.extract(process.log_betas, t, x_t)
    return f * high + (1 - f) * low


def loss_hybrid(
    diffusion: GaussianDiffusion, network: Callable, x_0: Tensor, t: Tensor, noise: Tensor
) -> Tensor:
    """Exercise 2.7: return L_hybrid of each image, [N]."""
    x_t = diffusion.q_sample(x_0, t, noise)
    output = diffusion.predict(network, x_t, t)
    eps_hat, v = output.chunk(2, 1)
    stopped = torch.cat([eps_hat.detach(), v], 1)
    bits = vb_terms_bpd(diffusion, stopped, x_0, x_t, t)
    return squared_error(eps_hat, noise) + 0.001 * diffusion.num_timesteps * bits


def ddim_step(x_0_hat: Tensor, eps_hat: Tensor, alpha_bar_prev: float, sigma: float) -> Tensor:
    """Exercise 2.8: return the mean of x at the next lower noise level."""
    return alpha_bar_prev**0.5 * x_0_hat + (1 - alpha_bar_prev - sigma**2) ** 0.5 * eps_hat


@torch.no_grad()
def ddim(process: GaussianDiffusion, network: Callable, x: Tensor) -> Tensor:
    """Exercise 2.9: return samples that start from the noise x, without added noise."""
    for i in reversed(range(process.num_timesteps)):
        t = torch.full((len(x),), i)
        eps_hat = process.predict(network, x, t)[:, :1]
        x_0_hat = process.x_0_from_noise(x, t, eps_hat).clamp(-1, 1)
        eps_hat = process.noise_from_x_0(x, t, x_0_hat)
        x = ddim_step(x_0_hat, eps_hat, process.alpha_bar_prev[i].item(), 0.0)
    return x


@torch.no_grad()
def family_sample(process: GaussianDiffusion, network: Callable, x: Tensor, eta: float) -> Tensor:
    """Exercise 2.10: return samples that start from the noise x, with sigma^2 = eta^2 beta_tilde."""
    for i in reversed(range(process.num_timesteps)):
        a, a_prev = process.alpha_bar[i].item(), process.alpha_bar_prev[i].item()
        output = process.predict(network, x, torch.full((len(x),), i))
        x_0_hat = ((x - (1 - a) ** 0.5 * output[:, :1]) / a**0.5).clamp(-1, 1)
        eps_hat = (x - a**0.5 * x_0_hat) / (1 - a) ** 0.5
        sigma = eta * process.beta_tilde[i].item() ** 0.5
        x = a_prev**0.5 * x_0_hat + (1 - a_prev - sigma**2) ** 0.5 * eps_hat + sigma * torch.randn_like(x)
    return x
