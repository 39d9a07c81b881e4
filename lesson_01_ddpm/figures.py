"""Figures of ddpm.ipynb that need more code than a cell should show."""

import math

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.diagrams import HIGHLIGHT, arrow, box, canvas
from lesson_01_ddpm.unet import UNet, UNetConfig, timestep_embedding


def plot_unet(config: UNetConfig) -> Figure:
    """Return a diagram of the UNet: encoder on the left, decoder on the right, skip connections between."""
    levels = len(config.channel_mult)
    figure, axes = canvas(8, 3.6, 10, levels + 1.6)
    for level, mult in enumerate(config.channel_mult):
        size, channels = config.image_size // 2**level, int(mult * config.num_channels)
        y, indent = levels - level - 0.1, 0.45 * level
        width = 2.4 - 0.3 * level
        attention = " + attention" if size in config.attention_resolutions else ""
        name, blocks = f"{size}x{size}, {channels} channels", config.num_res_blocks + 1
        box(axes, 0.6 + indent, y, width, 0.72, f"{name}\nresidual block{attention}", size=7)
        decoder = f"{blocks} x (residual{attention})" if attention else f"{blocks} residual blocks"
        box(axes, 9.4 - indent - width, y, width, 0.72, f"{name}\n{decoder}", size=7)
        for i in range(blocks):  # of the decoder
            skip = "skip connections" if level == 0 and i == blocks - 1 else ""
            height = y + 0.72 * (i + 1) / (blocks + 1)
            arrow(axes, (0.6 + indent + width, height), (9.4 - indent - width, height), skip, dashed=True)
        if level < levels - 1:
            below = 0.6 + indent + 0.9
            arrow(axes, (below, y), (below, y - 0.27))
            arrow(axes, (10 - below, y - 0.27), (10 - below, y))
            axes.text(below + 0.1, y - 0.14, "stride-2 convolution", va="center", fontsize=6)
            axes.text(9.9 - below, y - 0.14, "upsample, convolution", ha="right", va="center", fontsize=6)
    x = 0.6 + 0.45 * (levels - 1)
    box(axes, 3.6, 0.08, 2.8, 0.55, "bottleneck: residual, attention, residual", size=7)
    arrow(axes, (x + 0.9, 0.9), (3.6, 0.36))
    arrow(axes, (6.4, 0.36), (10 - x - 0.9, 0.9))
    box(axes, 3.4, levels + 0.95, 3.2, 0.5, "t → [cos, sin] → MLP → emb", HIGHLIGHT, size=7)
    for start, end in ((3.4, 2.6), (6.6, 7.4)):
        arrow(axes, (start, levels + 1.1), (end, levels + 0.64))
    axes.text(5, levels + 0.82, "emb goes to every residual block", ha="center", va="center", fontsize=7)
    axes.text(0.5, levels + 0.95, "x_t", ha="right", va="center", fontsize=9)
    arrow(axes, (0.55, levels + 0.95), (0.9, levels + 0.64))
    axes.text(9.5, levels + 0.95, "predicted noise", ha="center", va="center", fontsize=9)
    arrow(axes, (9.1, levels + 0.64), (9.4, levels + 0.85))
    return figure


def plot_timestep_embedding(width: int = 32) -> Figure:
    """Return the timestep embedding of all t as an image, one row per component."""
    embedding = timestep_embedding(torch.arange(1000), width)
    figure = Figure((6, 2.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(embedding.T, aspect="auto", cmap="RdBu", interpolation="nearest")
    axes.set(xlabel="t", ylabel="component")
    figure.colorbar(image)
    return figure


def plot_reverse_conditional(axes: Axes, beta: float, alpha_bar: float, x_t: float = 0.1) -> None:
    """Plot the exact q(x_{t-1} | x_t) for data with two peaks, and the Gaussian with equal moments.

    x_0 is an equal mixture of Gaussians at -1 and 1 with standard deviation 0.35. alpha_bar is that of
    x_{t-1}: 1 means that x_{t-1} is x_0 itself, and 0 that it is pure noise. beta is that of the step.
    """
    x = np.linspace(-4, 4, 4000)
    mean, variance = math.sqrt(alpha_bar), 0.35**2 * alpha_bar + 1 - alpha_bar
    prior = np.exp(-((x - mean) ** 2) / (2 * variance)) + np.exp(-((x + mean) ** 2) / (2 * variance))
    density = prior * np.exp(-((x_t - math.sqrt(1 - beta) * x) ** 2) / (2 * beta))
    density /= np.trapezoid(density, x)
    mean = np.trapezoid(x * density, x)
    variance = np.trapezoid((x - mean) ** 2 * density, x)
    gaussian = np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    axes.fill_between(x, prior / np.trapezoid(prior, x), color="0.9", label=r"$x_{t-1}$ before seeing $x_t$")
    axes.plot(x, density, label=r"$x_{t-1}$ given $x_t$, exact")
    axes.plot(x, gaussian, "--", label="Gaussian with its mean and variance")
    axes.set(xlabel=r"$x_{t-1}$", yticks=[], xlim=(-2.5, 2.5))


class WithoutSkips(nn.Module):
    """A UNet whose decoder receives zeros in place of the encoder's feature maps."""

    def __init__(self, network: UNet):
        super().__init__()
        self.network = network

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """Return the predicted noise [N, C, H, W]."""
        h, skips, emb = self.network.encode(x_t, t)
        for layers in self.network.up:
            h = layers(torch.cat([h, torch.zeros_like(skips.pop())], 1), emb, None)
        return self.network.conv_out(h)
