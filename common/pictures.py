"""Pictures of samples, trajectories and losses. Images come in as float [N, 1 or 3, H, W] in [-1, 1]."""

import textwrap
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image

from common.data import to_uint8
from common.runs import read_metrics

matplotlib.rcParams["font.size"] = 9


def as_grid(images, columns, **settings):
    """[N, C, H, W] -> [C, height, width]: torchvision's make_grid, which takes seconds to load."""
    from torchvision.utils import make_grid

    return make_grid(images, columns, **settings)


def label_grid(images, columns=8, row_labels=None, column_labels=None, scale=2.0):
    """A matplotlib figure of images in rows of `columns`, with a label for each row and column if given."""
    rows = -(-len(images) // columns)
    picture = as_grid(to_uint8(images.cpu()).float() / 255, columns, padding=2, pad_value=0.25)
    side = images.shape[-1] + 2
    column_labels = [textwrap.fill(shortened(label), 11) for label in column_labels or []]
    row_labels = [shortened(label) for label in row_labels or []]
    left = 0.1 + 0.075 * max(map(len, row_labels), default=0)
    top = 0.1 + 0.17 * max((label.count("\n") + 1 for label in column_labels), default=0)
    width, height = columns * side * scale / 100, rows * side * scale / 100
    figure = Figure((width + left + 0.1, height + top + 0.1), dpi=150)
    size = figure.get_size_inches()
    axes = figure.add_axes((left / size[0], 0.1 / size[1], width / size[0], height / size[1]))
    axes.imshow(picture.permute(1, 2, 0).numpy(), interpolation="nearest")
    as_it_is = {"parse_math": False}  # a caption may hold dollars
    axes.set_xticks([side * (i + 0.5) for i in range(len(column_labels))], column_labels, **as_it_is)
    axes.set_yticks([side * (i + 0.5) for i in range(rows)] if row_labels else [], row_labels, **as_it_is)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def shortened(label, length=60):
    text = str(label)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def spread(items, count):
    """At most `count` of the items, evenly spread from the first to the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def trajectory_strip(steps, columns=8):
    """x_t above the predicted x_0 of a batch's first sample, at `columns` of a sampler's steps."""
    chosen = spread(steps, columns)
    images = torch.cat([torch.stack([s.x_t[0] for s in chosen]), torch.stack([s.x_0[0] for s in chosen])])
    names = [f"t = {s.t}" for s in chosen]
    return label_grid(images, len(chosen), row_labels=["x_t", "predicted x_0"], column_labels=names)


def frames_of(steps, columns=None, count=40):
    """Frames of sampling, as grids: at most `count` of the steps' x_t, then the finished samples."""
    images = [step.x_t for step in spread(steps, count)] + 15 * [steps[-1].x_prev]
    columns = columns or int(np.ceil(len(images[0]) ** 0.5))
    return [as_grid(to_uint8(x), columns, padding=1).permute(1, 2, 0).numpy() for x in images]


def save_gif(path, frames, scale=3):
    pictures = [Image.fromarray(f).resize((f.shape[1] * scale, f.shape[0] * scale), 0) for f in frames]
    pictures[0].save(path, format="GIF", save_all=True, append_images=pictures[1:], duration=80, loop=0)


def loss_curve(metrics_csv, reference_csv=None):
    """A figure of the training loss (faint: each step; strong: mean), validation loss and learning rate.

    reference_csv: the metrics of the run behind the shipped weights, drawn beside the reader's own.
    """
    rows = read_metrics(metrics_csv)
    steps, losses = np.array([r["step"] for r in rows]), np.array([r["loss"] for r in rows])
    window = min(100, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    figure = Figure((6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.semilogy(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.5)
    axes.semilogy(steps[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window} steps")
    seen = [(r["step"], r["validation_loss"]) for r in rows if np.isfinite(r.get("validation_loss", np.nan))]
    if seen:
        axes.semilogy(
            *zip(*seen), "o-", color="tab:orange", markersize=3, label="validation, averaged weights"
        )
    if reference_csv and Path(reference_csv).exists():
        past = [(r["step"], r["loss"]) for r in read_metrics(reference_csv) if r["step"] <= steps[-1]]
        if past:
            axes.semilogy(*zip(*past), color="black", linewidth=0.8, label="training of the shipped weights")
    rate = axes.twinx()
    rate.plot(steps, [r["learning_rate"] for r in rows], color="gray", linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    return figure


def curves(lines, x_label, y_label, logarithmic=True):
    """A figure of curves, on logarithmic axes if not said otherwise. lines: name -> list of (x, y)."""
    figure = Figure((6.6, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    draw = axes.loglog if logarithmic else axes.plot
    for name, points in lines.items():
        draw(*zip(*points), "o-", markersize=3, label=name)
    if logarithmic:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=x_label, ylabel=y_label)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def bars(values, x_label):
    """A figure of horizontal bars. values: name -> (value, its standard error)."""
    figure = Figure((5, 0.5 + 0.4 * len(values)), dpi=120, layout="constrained")
    axes = figure.subplots()
    means, errors = zip(*values.values())
    axes.barh(list(values), means, xerr=errors, height=0.6, capsize=3)
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    return figure
