"""Figures of text_conditioning.ipynb that need more code than a cell should show."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from common.diagrams import HIGHLIGHT, arrow, box, canvas


def plot_text_path() -> Figure:
    """Return a diagram of how a caption reaches the UNet: as one vector, and as keys and values."""
    figure, axes = canvas(9, 2.3, 13, 3.4)
    box(axes, 0.1, 1.45, 1.7, 0.7, '"a red seven"')
    box(axes, 2.3, 1.45, 1.4, 0.7, "tokenizer", HIGHLIGHT)
    box(axes, 4.2, 1.45, 1.9, 0.7, "text transformer", HIGHLIGHT)
    box(axes, 6.8, 2.15, 2.0, 0.7, "pooled embedding\n(1 vector)", HIGHLIGHT)
    box(axes, 6.8, 0.75, 2.0, 0.7, "token states\n(1 vector per token)", HIGHLIGHT, size=7.5)
    box(axes, 9.6, 0.3, 3.3, 3.0, "")
    axes.text(11.25, 3.05, "UNet", fontsize=9, weight="bold", ha="center", va="center")
    box(axes, 9.8, 2.0, 2.9, 0.8, "added to the timestep embedding,\nwhich every residual block gets", size=7)
    box(axes, 9.8, 0.6, 2.9, 0.8, "keys and values\nin every attention layer", size=7)
    for start, end in (
        ((1.8, 1.8), (2.3, 1.8)),
        ((3.7, 1.8), (4.2, 1.8)),
        ((6.1, 1.95), (6.8, 2.4)),
        ((6.1, 1.65), (6.8, 1.2)),
        ((8.8, 2.5), (9.8, 2.45)),
        ((8.8, 1.1), (9.8, 1.05)),
    ):
        arrow(axes, start, end)
    return figure


def plot_look_up(axes: Axes, weights: Float[Tensor, "keys"], title: str) -> None:
    """Plot the weights that one query gives to the keys."""
    axes.bar(range(len(weights)), weights)
    axes.set(title=title, xlabel="key", ylim=(0, 1))


def plot_x_0_errors(
    timesteps: Sequence[int], errors: dict[str, list[float]], baselines: dict[str, list[float]]
) -> Figure:
    """Return a plot of squared errors of x_0 against t: of predictions (solid) and of baselines (dashed)."""
    figure = Figure((6, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, values in errors.items():
        axes.semilogy(timesteps, values, ".-", label=name)
    for name, values in baselines.items():
        axes.semilogy(timesteps, values, "--", label=name)
    axes.set(xlabel="t", ylabel=r"error of $\hat x_0$")
    axes.legend(fontsize=8)
    return figure


def x_0_error(
    predict_x_0: Callable[[Tensor, Tensor], Tensor], x_0: Tensor, alpha_bar: Tensor, t: int
) -> float:
    """Return the mean squared error of a prediction of x_0 at timestep t, per pixel and channel."""
    a = alpha_bar[t].float()
    noise = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(t))
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * noise
    with torch.no_grad():
        predicted = predict_x_0(x_t, torch.full((len(x_0),), t))
    return (predicted - x_0).square().mean().item()
