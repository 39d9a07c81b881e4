"""One correct answer for each exercise of adm.ipynb; the notebook falls back on them."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lesson_01_ddpm.diffusion import GaussianDiffusion


def ada_gn(norm: nn.GroupNorm, h: Tensor, scale_shift: Tensor) -> Tensor:
    """Exercise 3.1: return (1 + scale) norm(h) + shift."""
    scale, shift = scale_shift[:, :, None, None].chunk(2, 1)
    return norm(h) * (1 + scale) + shift


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Exercise 3.2: split channels into heads, [N, positions, C] -> [N, heads, positions, C / heads]."""
    n, positions, c = x.shape
    return x.view(n, positions, num_heads, c // num_heads).transpose(1, 2)


def adm_block(block: Any, x: Tensor, emb: Tensor) -> Tensor:
    """Exercise 3.3: return the output of ADM's residual block."""
    h = F.silu(block.norm_1(x))
    if block.resample:
        h, x = block.resample(h), block.resample(x)
    h = ada_gn(block.norm_2, block.conv_1(h), block.emb(F.silu(emb)))
    return block.skip(x) + block.conv_2(F.silu(h))


class ClassConditional(nn.Module):
    """Exercise 3.4: a UNet with one learned vector per class: (x_t, t, y) -> the UNet's output."""

    def __init__(self, unet: nn.Module, num_classes: int, emb_channels: int):
        super().__init__()
        self.unet = unet
        self.table = nn.Embedding(num_classes, emb_channels)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.unet(x_t, t, embedding=self.table(y))


class_conditional = ClassConditional  # under the name of its check


def log_density(x_t: Tensor, data: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Exercise 3.5: return log p(x_t) up to a constant, [N], if `data` [M, 1, H, W] is all there is."""
    offsets = x_t[:, None] - alpha_bar_t.sqrt() * data
    exponents = -offsets.square().sum((2, 3, 4)) / (2 * (1 - alpha_bar_t))
    return exponents.logsumexp(1)


def log_p_gradient(classifier: Callable, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Exercise 3.6: return the gradient of log p(y | x_t) with respect to x_t."""
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_(True)
        log_p = classifier(x_t, t).log_softmax(1)
        return torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x_t)[0]


def guided_mean(mean: Tensor, variance: Tensor, gradient: Tensor, scale: float) -> Tensor:
    """Exercise 3.7: return the mean of a guided reverse step."""
    return mean + scale * variance * gradient


def classifier_loss(diffusion: GaussianDiffusion, classifier: Callable, x_0: Tensor, label: Tensor) -> Tensor:
    """Exercise 3.8: return the cross entropy of a classifier of noisy images, a scalar."""
    t = torch.randint(diffusion.num_timesteps, (len(x_0),))
    x_t = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    return F.cross_entropy(classifier(x_t, t), label)


def guided_noise(eps_hat: Tensor, gradient: Tensor, alpha_bar_t: Tensor, scale: float) -> Tensor:
    """Exercise 3.10: return the predicted noise that stands for the guided score."""
    return eps_hat - scale * (1 - alpha_bar_t).sqrt() * gradient
