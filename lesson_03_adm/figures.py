"""The plane with three classes, and figures of adm.ipynb that need more code than a cell should show."""

from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common.diagrams import HIGHLIGHT, arrow, box, canvas
from lesson_01_ddpm.diffusion import GaussianDiffusion

CENTERS = torch.tensor([[-0.7, -0.4], [0.7, -0.4], [0.0, 0.8]])  # m_y of three classes in the plane
TAU_SQUARED = 0.05  # the variance of a class
COLOURS = ["tab:blue", "tab:green", "tab:orange"]


def plot_blocks() -> Figure:
    """Return a diagram of DDPM's residual block next to ADM's."""
    figure, axes = canvas(8.5, 3.0, 11, 3.9)
    for y, name, parts, skip in (
        (2.3, "DDPM", ["norm, SiLU", "conv", "+ emb", "norm, SiLU", "conv"], ""),
        (0.3, "ADM", ["norm, SiLU", "up / down", "conv", "AdaGN(emb), SiLU", "conv"], "up / down"),
    ):
        axes.text(0.1, y + 0.3, name, fontsize=9, weight="bold", va="center")
        x = start = 1.2
        for text in parts:
            width = 1.75 if "AdaGN" in text else 1.35
            new = "emb" in text or "up" in text
            arrow(axes, (x - 0.3, y + 0.3), (x, y + 0.3))
            box(axes, x, y, width, 0.6, text, HIGHLIGHT if new else "#eef1f5", size=7.5)
            x += width + 0.3
        end, top = x + 0.1, y + 1.1
        axes.plot(
            [start - 0.2, start - 0.2, end, end],
            [y + 0.3, top, top, y + 0.48],
            "--",
            color="black",
            lw=1,
            zorder=0,
        )
        box(axes, 4.6, top - 0.25, 1.35, 0.5, "skip (1x1 conv)", "#eef1f5", size=7.5)
        if skip:
            box(axes, 2.9, top - 0.25, 1.35, 0.5, skip, HIGHLIGHT, size=7.5)
        arrow(axes, (x - 0.3, y + 0.3), (end - 0.17, y + 0.3))
        axes.text(
            end,
            y + 0.3,
            "+",
            ha="center",
            va="center",
            fontsize=9,
            bbox={"boxstyle": "circle", "fc": "white"},
        )
        arrow(axes, (end + 0.17, y + 0.3), (end + 0.6, y + 0.3))
    return figure


def plot_guidance() -> Figure:
    """Return a diagram of a guided reverse step: network and classifier see the same noisy image."""
    figure, axes = canvas(8, 2.2, 10, 2.8)
    box(axes, 0.1, 1.1, 1.1, 0.6, "$x_t$, t")
    box(axes, 1.9, 1.9, 1.7, 0.6, "diffusion network")
    box(axes, 1.9, 0.3, 1.7, 0.6, "classifier", HIGHLIGHT)
    box(axes, 4.4, 1.9, 2.0, 0.6, r"mean $\mu$, variance $\Sigma$")
    box(axes, 4.4, 0.3, 2.0, 0.6, r"$g = \nabla \log p(y\,|\,x_t)$", HIGHLIGHT)
    box(axes, 7.1, 1.1, 1.5, 0.6, r"$\mu + s\,\Sigma\,g$", HIGHLIGHT)
    box(axes, 9.2, 1.1, 0.75, 0.6, "$x_{t-1}$")
    for start, end in (
        ((1.2, 1.5), (1.9, 2.2)),
        ((1.2, 1.3), (1.9, 0.6)),
        ((3.6, 2.2), (4.4, 2.2)),
        ((3.6, 0.6), (4.4, 0.6)),
        ((6.4, 2.2), (7.2, 1.7)),
        ((6.4, 0.6), (7.2, 1.1)),
        ((8.6, 1.4), (9.2, 1.4)),
    ):
        arrow(axes, start, end)
    axes.text(8.9, 1.55, "+ noise", ha="center", va="bottom", fontsize=7)
    return figure


def log_p_classes(
    diffusion: GaussianDiffusion, x_t: Tensor, t: Tensor, tau_squared: float = TAU_SQUARED
) -> Tensor:
    """Return log p(x_t | y) of each class up to a constant, [N, 3], for points x_t [N, 2, 1, 1].

    A class is a Gaussian around its center in `CENTERS`; tau_squared: its variance in each direction.
    """
    a = diffusion.alpha_bar[t].float().view(-1, 1)
    squared = (x_t.flatten(1)[:, None] - a[:, None].sqrt() * CENTERS).square().sum(2)
    return -squared / (2 * (a * tau_squared + 1 - a))


def plane_denoiser(
    diffusion: GaussianDiffusion, tau_squared: float = TAU_SQUARED
) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the ideal denoiser of the three classes in the plane, without knowing the class."""

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        a, points = diffusion.alpha_bar[t].float().view(-1, 1, 1), x_t.flatten(1)[:, None]
        log_p = log_p_classes(diffusion, x_t, t, tau_squared)
        p_class = log_p.softmax(1)[:, :, None]  # p(class | x_t), [N, 3, 1]
        gain = a.sqrt() * tau_squared / (a * tau_squared + 1 - a)
        x_0_of_class = CENTERS + gain * (points - a.sqrt() * CENTERS)  # E[x_0 | x_t, class], [N, 3, 2]
        x_0 = (p_class * x_0_of_class).sum(1, keepdim=True)
        return ((points - a.sqrt() * x_0) / (1 - a).sqrt()).view_as(x_t)

    return denoiser


def plot_field(
    axes: Axes,
    field: Callable[[Tensor, Tensor], Tensor],
    t: int,
    alpha_bar: float,
    title: str | None = None,
    arrow_scale: float | None = None,
) -> None:
    """Plot a vector field at timestep t, and where the classes are at this noise level.

    arrow_scale: how long a vector is that fills the panel's width; None plots only the directions.
    """
    line = torch.linspace(-1.8, 1.8, 15)
    points = torch.cartesian_prod(line, line).view(-1, 2, 1, 1)
    arrows = field(points, torch.full((len(points),), t)).flatten(1)
    if arrow_scale is None:
        arrows = arrows / arrows.norm(dim=1, keepdim=True)
    axes.quiver(*points.flatten(1).T, *arrows.T, color="gray", scale=arrow_scale or 22)
    x, y = (alpha_bar**0.5 * CENTERS).T
    axes.scatter(x, y, s=200, c=COLOURS, alpha=0.7)
    axes.set(title=title or f"t = {t}", xticks=[], yticks=[])
