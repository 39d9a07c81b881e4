"""Figures of samples, trajectories, losses and tables. Images are float [N, 1 or 3, H, W] in [-1, 1]."""

import textwrap
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib
import numpy as np
import torch
from jaxtyping import Float, Shaped, UInt8
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from PIL import Image, ImageDraw
from torch import Tensor

from common.images import to_uint8
from common.protocols import SamplerStep

# Fonts with Chinese, Japanese and Korean characters of Linux, macOS and Windows
CJK_FONTS = (
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "WenQuanYi Micro Hei", "WenQuanYi Zen Hei"),
    *("Droid Sans Fallback", "PingFang SC", "Hiragino Sans GB", "Arial Unicode MS", "Microsoft YaHei"),
    *("Malgun Gothic", "Yu Gothic"),
)
matplotlib.rcParams["font.size"] = 9
Item = TypeVar("Item")
Curves = Mapping[str, Sequence[tuple[float, float]]]  # name -> points (x, y)


def use_fonts(names: Sequence[str]) -> None:
    """Let figures take what their font lacks from DejaVu Sans, then from the installed fonts of `names`."""
    families = [*matplotlib.rcParams["font.family"], "DejaVu Sans", *names]
    known = {"sans-serif", "serif", "monospace", *font_manager.get_font_names()}
    matplotlib.rcParams["font.family"] = [name for name in dict.fromkeys(families) if name in known]


use_fonts(CJK_FONTS)


def image_grid(
    images: Shaped[Tensor, "n c h w"], columns: int, **make_grid_kwargs: Any
) -> Shaped[Tensor, "3 height width"]:
    """Arrange images in rows of `columns` with torchvision's make_grid."""
    from torchvision.utils import make_grid  # here, because importing it takes seconds

    return make_grid(images, columns, **make_grid_kwargs)


def plot_grid(
    images: Float[Tensor, "n c h w"],
    columns: int = 8,
    row_labels: Sequence[Any] | None = None,
    column_labels: Sequence[Any] | None = None,
    scale: float = 2.0,
) -> Figure:
    """Return a figure of images in rows of `columns`, with optional labels for rows and columns.

    scale: pixels of the figure per pixel of an image, at 100 dots per inch.
    """
    rows = -(-len(images) // columns)
    grid = image_grid(to_uint8(images.cpu()).float() / 255, columns, padding=2, pad_value=0.25)
    side = images.shape[-1] + 2
    column_labels = [wrap(truncate(label), 11) for label in column_labels or []]
    row_labels = [truncate(label) for label in row_labels or []]
    left = 0.1 + 0.075 * max(map(text_width, row_labels), default=0)
    top = 0.1 + 0.17 * max((label.count("\n") + 1 for label in column_labels), default=0)
    width, height = columns * side * scale / 100, rows * side * scale / 100
    figure = Figure((width + left + 0.1, height + top + 0.1), dpi=150)
    size = figure.get_size_inches()
    axes = figure.add_axes((left / size[0], 0.1 / size[1], width / size[0], height / size[1]))
    axes.imshow(grid.permute(1, 2, 0).numpy(), interpolation="nearest")
    verbatim = {"parse_math": False}  # a caption may contain dollar signs
    axes.set_xticks([side * (i + 0.5) for i in range(len(column_labels))], column_labels, **verbatim)
    axes.set_yticks([side * (i + 0.5) for i in range(rows)] if row_labels else [], row_labels, **verbatim)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=8)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure


def plot_rows(rows: Mapping[str, Float[Tensor, "n c h w"]], scale: float = 1.4, **grid_kwargs: Any) -> Figure:
    """Return a figure with one labelled row of images per batch. rows: name -> images, N in each."""
    images = list(rows.values())
    return plot_grid(torch.cat(images), len(images[0]), row_labels=list(rows), scale=scale, **grid_kwargs)


def truncate(label: Any, length: int = 60) -> str:
    """Return a label as printable text of at most `length` characters."""
    text = printable(label)
    return text if len(text) <= length else f"{text[: length - 1]}…"


def printable(label: Any) -> str:
    """Return a label as text that the fonts of figures can show.

    A character that they lack becomes a compatible one ("～" becomes "~"), else its code ("\\u72d7").
    """
    properties = [font_manager.FontProperties(family=[name]) for name in matplotlib.rcParams["font.family"]]
    fonts = [font_manager.get_font(font_manager.findfont(each)) for each in properties]

    def is_shown(text: str) -> bool:
        return all(c == "\n" or any(font.get_char_index(ord(c)) for font in fonts) for c in text)

    def show(c: str) -> str:
        plain = unicodedata.normalize("NFKD", c)
        if is_shown(c) or is_shown(plain):
            return c if is_shown(c) else plain
        invisible = unicodedata.category(c) in ("Mn", "Cf")  # a modifier of another character
        return "" if invisible else c.encode("unicode_escape").decode()

    return "".join(map(show, unicodedata.normalize("NFC", str(label))))


def text_width(text: str) -> int:
    """Return the number of columns of a text; Chinese characters take two."""
    return len(text) + sum(unicodedata.east_asian_width(c) in "WF" for c in text)


def wrap(text: str, width: int) -> str:
    """Return a text as lines of about `width` columns."""
    return textwrap.fill(text, max(1, width * len(text) // max(1, text_width(text))))


def evenly_spaced(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the items, evenly spaced from the first to the last."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def plot_trajectory(
    steps: Sequence[SamplerStep], columns: int = 8, timesteps: Sequence[int] | Tensor | None = None
) -> Figure:
    """Return a figure of x_t above the predicted x_0 of the first sample, at `columns` of the steps.

    timesteps: those of a respaced process; with them, the labels show the original timesteps.
    """
    chosen = evenly_spaced(steps, columns)
    images = torch.cat([torch.stack([s.x_t[0] for s in chosen]), torch.stack([s.x_0[0] for s in chosen])])
    names = [f"t = {s.t if timesteps is None else int(timesteps[s.t])}" for s in chosen]
    return plot_grid(images, len(chosen), row_labels=["x_t", "predicted x_0"], column_labels=names)


def sampling_frames(
    steps: Sequence[SamplerStep], columns: int | None = None, count: int = 40
) -> list[UInt8[np.ndarray, "_ _ 3"]]:
    """Return an animation of sampling: grids of x_t at up to `count` steps, then the samples for a while."""
    images = [step.x_t for step in evenly_spaced(steps, count)] + 15 * [steps[-1].x_prev]
    columns = columns or int(np.ceil(len(images[0]) ** 0.5))
    return [image_grid(to_uint8(x), columns, padding=1).permute(1, 2, 0).numpy() for x in images]


def save_gif(
    path: str | Path,
    frames: Sequence[UInt8[np.ndarray, "_ _ 3"]],
    scale: int = 3,
    column_labels: Sequence[str] = (),
) -> None:
    """Write frames as an animated GIF, enlarged by `scale`, with a label above each column."""
    images = [Image.fromarray(f).resize((f.shape[1] * scale, f.shape[0] * scale), 0) for f in frames]
    if column_labels:
        width, height = images[0].size
        header, step = Image.new("RGB", (width, 36), "white"), width // len(column_labels)
        for i, label in enumerate(column_labels):
            text, place = wrap(printable(label), step // 7), ((i + 0.5) * step, 18)
            ImageDraw.Draw(header).multiline_text(place, text, "black", anchor="mm", align="center")
        for i, image in enumerate(images):
            images[i] = Image.new("RGB", (width, height + 36))
            images[i].paste(header, (0, 0))
            images[i].paste(image, (0, 36))
    images[0].save(path, format="GIF", save_all=True, append_images=images[1:], duration=80, loop=0)


def plot_losses(
    rows: Sequence[Mapping[str, Any]], reference: Sequence[Mapping[str, Any]] | None = None
) -> Figure:
    """Return a figure of training loss, validation loss and learning rate.

    rows: of a metrics.csv. reference: those of the run behind the pretrained weights, plotted for comparison.
    """
    steps, losses = np.array([r["step"] for r in rows]), np.array([r["loss"] for r in rows])
    window = min(100, len(losses))
    smooth = np.convolve(losses, np.ones(window) / window, "valid")
    figure = Figure((6, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.semilogy(steps, losses, color="tab:blue", alpha=0.2, linewidth=0.5)
    axes.semilogy(steps[window - 1 :], smooth, color="tab:blue", label=f"training, mean of {window} steps")
    validation = [
        (r["step"], r["validation_loss"]) for r in rows if np.isfinite(r.get("validation_loss", np.nan))
    ]
    if validation:
        label = "validation, averaged weights"
        axes.semilogy(*zip(*validation), "o-", color="tab:orange", markersize=3, label=label)
    earlier = [(r["step"], r["loss"]) for r in reference or [] if r["step"] <= steps[-1]]
    if earlier:
        label = "training of the pretrained weights"
        axes.semilogy(*zip(*earlier), color="black", linewidth=0.8, label=label)
    rate = axes.twinx()
    rate.plot(steps, [r["learning_rate"] for r in rows], color="gray", linewidth=0.8, linestyle=":")
    rate.set_ylabel("learning rate (dotted)")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    return figure


def plot_curves(curves: Curves, x_label: str, y_label: str, logarithmic: bool = True) -> Figure:
    """Return a figure of curves, on logarithmic axes unless told otherwise."""
    figure = Figure((6.6, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    plot = axes.loglog if logarithmic else axes.plot
    lines = [plot(*zip(*points), "o-", markersize=3)[0] for points in curves.values()]
    if logarithmic:
        for axis in (axes.xaxis, axes.yaxis):
            low, high = axis.get_view_interval()
            axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 500 * low else (1,)))
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter(NullFormatter())
    axes.set(xlabel=x_label, ylabel=y_label)
    legend = figure.legend(lines, list(map(truncate, curves)), loc="outside right upper", fontsize="small")
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure


def plot_bars(values: Mapping[str, tuple[float, float]], x_label: str) -> Figure:
    """Return a figure of horizontal bars. values: name -> (value, its standard error)."""
    figure = Figure((5, 0.5 + 0.4 * len(values)), dpi=120, layout="constrained")
    axes = figure.subplots()
    means, errors = zip(*values.values())
    axes.barh(range(len(values)), means, xerr=errors, height=0.6, capsize=3)
    axes.set_yticks(range(len(values)), list(map(truncate, values)), parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    return figure
