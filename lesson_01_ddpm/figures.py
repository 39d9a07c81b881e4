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
        text = f"{size}x{size}, {channels} channels\nresidual block{attention}"
        box(axes, 0.6 + indent, y, width, 0.72, text, size=7)
        box(
            axes,
            9.4 - indent - width,
            y,
            width,
            0.72,
            text.replace("residual block", "residual blocks"),
            size=7,
        )
        skip = "skip connection" if level == 0 else ""
        arrow(axes, (0.6 + indent + width, y + 0.36), (9.4 - indent - width, y + 0.36), skip, dashed=True)
        if level < levels - 1:
            below = 0.6 + indent + 0.9
            arrow(axes, (below, y), (below, y - 0.27))
            arrow(axes, (10 - below, y - 0.27), (10 - below, y))
    x = 0.6 + 0.45 * (levels - 1)
    box(axes, 3.6, 0.08, 2.8, 0.55, "middle: residual, attention, residual", size=7)
    arrow(axes, (x + 0.9, 0.9), (3.6, 0.36))
    arrow(axes, (6.4, 0.36), (10 - x - 0.9, 0.9))
    box(axes, 3.4, levels + 0.95, 3.2, 0.5, "t → [cos, sin] → MLP → every residual block", HIGHLIGHT, size=7)
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


def plot_reverse_conditional(axes: Axes, beta: float, x_t: float) -> None:
    """Plot the exact q(x_{t-1} | x_t) for a distribution with two peaks, and the Gaussian with equal moments.

    x_{t-1} is an equal mixture of Gaussians at -1 and 1 with standard deviation 0.35.
    """
    x = np.linspace(-2, 2, 1000)
    prior = np.exp(-((x - 1) ** 2) / (2 * 0.35**2)) + np.exp(-((x + 1) ** 2) / (2 * 0.35**2))
    density = prior * np.exp(-((x_t - math.sqrt(1 - beta) * x) ** 2) / (2 * beta))
    density /= np.trapezoid(density, x)
    mean = np.trapezoid(x * density, x)
    variance = np.trapezoid((x - mean) ** 2 * density, x)
    axes.plot(x, density, label="exact")
    gaussian = np.exp(-((x - mean) ** 2) / (2 * variance)) / np.sqrt(2 * np.pi * variance)
    axes.plot(x, gaussian, "--", label="Gaussian")
    axes.set(title=rf"$\beta$ = {beta}", xlabel=r"$x_{t-1}$", yticks=[])
    axes.legend(fontsize=7)


def without_skips(network: UNet) -> nn.Module:
    """Return a denoiser that runs the network with its skip connections switched off (set to zero)."""

    class NoSkips(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            h, skips, emb = network.encode(x_t, t)
            for layers in network.up:
                h = layers(torch.cat([h, torch.zeros_like(skips.pop())], 1), emb, None)
            return network.conv_out(h)

    return NoSkips()
