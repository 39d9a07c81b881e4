"""One correct answer for each exercise of ddpm.ipynb; the notebook falls back on them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesson_01_ddpm.diffusion import linear_betas

betas = linear_betas(1000)  # float64, like all tables; cast where it is used
alpha_bar = (1 - betas).cumprod(0)
alpha_bar_prev = torch.cat([torch.ones(1).double(), alpha_bar[:-1]])
beta_tilde = betas * (1 - alpha_bar_prev) / (1 - alpha_bar)


def per_image(table: Tensor, t: Tensor) -> Tensor:
    """Return table[t] as float32 in the shape [N, 1, 1, 1], which broadcasts over images."""
    return table[t].float().view(-1, 1, 1, 1)


def q_sample(x_0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """Exercise 1.1: return x_t."""
    return per_image(alpha_bar.sqrt(), t) * x_0 + per_image((1 - alpha_bar).sqrt(), t) * noise


def x_0_from_noise(x_t: Tensor, t: Tensor, eps_hat: Tensor) -> Tensor:
    """Exercise 1.2: return the x_0 from which q_sample makes x_t with noise eps_hat."""
    return (x_t - per_image((1 - alpha_bar).sqrt(), t) * eps_hat) / per_image(alpha_bar.sqrt(), t)


def best_x_0(x_t: Tensor, t: Tensor) -> Tensor:
    """Exercise 1.2: return the average x_0, given x_t, of a pixel that is -1 or 1 with equal probability."""
    return (per_image(alpha_bar.sqrt() / (1 - alpha_bar), t) * x_t).tanh()


def residual_block(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Exercise 1.3: return the output of a residual block."""
    h = block.conv_1(F.silu(block.norm_1(x)))
    h = h + block.emb(F.silu(emb))[:, :, None, None]
    h = block.conv_2(F.silu(block.norm_2(h)))
    return block.skip(x) + h


def loss_fn(network: Callable, x_0: Tensor) -> Tensor:
    """Exercise 1.4: return L_simple of a batch, a scalar."""
    t = torch.randint(1000, (len(x_0),))
    noise = torch.randn_like(x_0)
    eps_hat = network(q_sample(x_0, t, noise), t)
    return (eps_hat - noise).square().mean()


@torch.no_grad()
def update_average(average: nn.Module, network: nn.Module, step: int) -> None:
    """Exercise 1.5: move the averaged weights towards those of the network after training step 1, 2, ..."""
    rate = max(1 / step, 0.05)
    for averaged, latest in zip(average.parameters(), network.parameters()):
        averaged.lerp_(latest, rate)


def posterior_mean(x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Exercise 1.6: return the mean of q(x_{t-1} | x_t, x_0)."""
    coef_0 = alpha_bar_prev.sqrt() * betas / (1 - alpha_bar)
    coef_t = (1 - betas).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar)
    return per_image(coef_0, t) * x_0 + per_image(coef_t, t) * x_t


def reverse_step(network: Callable, x_t: Tensor, t: int) -> Tensor:
    """Exercise 1.7: return x_{t-1}."""
    steps = torch.full((len(x_t),), t)
    x_0_hat = x_0_from_noise(x_t, steps, network(x_t, steps)).clamp(-1, 1)
    mean = posterior_mean(x_0_hat, x_t, steps)
    if t == 0:
        return mean
    return mean + beta_tilde[t].sqrt().float() * torch.randn_like(x_t)


@torch.no_grad()
def sample(network: Callable, n: int) -> Tensor:
    """Exercise 1.7: return n samples, [n, 1, 32, 32]."""
    x = torch.randn(n, 1, 32, 32)
    for t in reversed(range(1000)):
        x = reverse_step(network, x, t)
    return x


def ideal_denoiser(data: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
    """Exercise 1.10: return the best prediction of the noise in x_t if `data` [M, 1, H, W] is all."""
    image_factor, noise_variance = per_image(alpha_bar.sqrt(), t), per_image(1 - alpha_bar, t)
    distance = (x_t[:, None] - image_factor[:, None] * data).square().sum((2, 3, 4))
    weights = (-distance / (2 * noise_variance.view(-1, 1))).softmax(1)
    x_0_hat = torch.einsum("nm,mchw->nchw", weights, data)
    return (x_t - image_factor * x_0_hat) / noise_variance.sqrt()
