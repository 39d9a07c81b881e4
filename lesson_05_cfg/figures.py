"""Figures of cfg.ipynb that need more code than a cell should show."""

from collections.abc import Callable

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common.diagrams import HIGHLIGHT, arrow, box, canvas
from common.files import read_json


def plot_guidance_flow() -> Figure:
    """Return a diagram of a guided network evaluation: one network, with the caption and without it."""
    figure, axes = canvas(8.5, 2.2, 11, 2.9)
    box(axes, 0.1, 1.15, 1.1, 0.6, "$x_t$, t")
    box(axes, 1.9, 2.0, 1.7, 0.6, '"a red seven"', HIGHLIGHT)
    box(axes, 1.9, 0.3, 1.7, 0.6, "empty caption", HIGHLIGHT)
    box(axes, 4.3, 2.0, 1.4, 0.6, "network")
    box(axes, 4.3, 0.3, 1.4, 0.6, "same network")
    box(axes, 6.4, 2.0, 1.3, 0.6, r"$\hat\epsilon_\mathrm{cond}$")
    box(axes, 6.4, 0.3, 1.3, 0.6, r"$\hat\epsilon_\mathrm{uncond}$")
    formula = (
        r"$\hat\epsilon_\mathrm{uncond} + s\,(\hat\epsilon_\mathrm{cond} - \hat\epsilon_\mathrm{uncond})$"
    )
    box(axes, 8.4, 1.15, 2.5, 0.6, formula, HIGHLIGHT)
    for start, end in (
        ((3.6, 2.3), (4.3, 2.3)),
        ((3.6, 0.6), (4.3, 0.6)),
        ((1.2, 1.5), (4.3, 2.1)),
        ((1.2, 1.4), (4.3, 0.8)),
        ((5.7, 2.3), (6.4, 2.3)),
        ((5.7, 0.6), (6.4, 0.6)),
        ((7.7, 2.2), (8.4, 1.6)),
        ((7.7, 0.7), (8.4, 1.3)),
    ):
        arrow(axes, start, end)
    return figure


def plot_arrows(
    axes: Axes, denoiser: Callable[[Tensor, Tensor], Tensor], t: int, centers: Tensor, wanted: int
) -> None:
    """Plot -eps_hat, the direction of a sampler's step, on a grid; centers: [K, 2], of the classes."""
    line = torch.linspace(-2, 2, 15)
    points = torch.cartesian_prod(line, line).view(-1, 2, 1, 1)
    arrows = -denoiser(points, torch.full((len(points),), t)).flatten(1)
    axes.quiver(*points.flatten(1).T, *arrows.T, color="gray")
    colors = ["tab:orange" if i == wanted else "tab:blue" for i in range(len(centers))]
    axes.scatter(centers[:, 0], centers[:, 1], s=300, c=colors, alpha=0.7)


def plot_sweep(path: str = "results/guidance_curve.json") -> Figure:
    """Return plots of accuracy, and of FID and diversity, against the guidance scale."""
    rows = [row for row in read_json(path)["rows"] if row["denoised_fn"] == "clip"]
    scales = [row["scale"] for row in rows]
    figure = Figure((8.5, 2.8), dpi=120, layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, label in (("digit_accuracy", "digit"), ("colour_accuracy", "color")):
        left.plot(scales, [row[name] for row in rows], "o-", markersize=4, label=f"{label} correct")
    for name, label in (("fid", "FID"), ("diversity", "diversity (real digits: 1)")):
        right.semilogy(scales, [row[name] for row in rows], "o-", markersize=4, label=label)
    for axes in (left, right):
        axes.set_xlabel("guidance scale s")
        axes.legend()
    return figure
