"""Figures of text_conditioning.ipynb that need more code than a cell should show."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from jaxtyping import Float
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from common.diagrams import EDGE, HIGHLIGHT, PLAIN, arrow, box, canvas
from common.files import read_json


def plot_text_path() -> Figure:
    """Return a diagram of how a caption reaches the UNet, with the matrix of attention weights."""
    figure, axes = canvas(9, 3.1, 13, 4.5)
    box(axes, 0.1, 2.55, 1.7, 0.7, '"a red seven"')
    box(axes, 2.2, 2.55, 1.3, 0.7, "tokenizer", HIGHLIGHT)
    box(axes, 3.9, 2.55, 1.8, 0.7, "text transformer", HIGHLIGHT)
    box(axes, 6.2, 3.3, 1.9, 0.8, "pooled embedding\n(1 vector)", HIGHLIGHT)
    box(axes, 6.2, 1.4, 1.9, 0.8, "token states\n(8 vectors)", HIGHLIGHT)
    box(axes, 8.7, 0.1, 4.2, 4.3, "")
    axes.text(10.8, 4.2, "UNet", fontsize=9, weight="bold", ha="center", va="center")
    box(axes, 8.9, 3.35, 3.8, 0.6, "added to the timestep embedding, for AdaGN", size=7.5)
    axes.text(10.85, 2.98, "weights of an attention layer at 8x8", fontsize=7.5, ha="center", va="center")
    axes.add_patch(Rectangle((9.5, 0.75), 0.6, 1.7, facecolor=HIGHLIGHT, edgecolor=EDGE))
    axes.add_patch(Rectangle((10.1, 0.75), 2.5, 1.7, facecolor=PLAIN, edgecolor=EDGE))
    axes.add_patch(Rectangle((9.5, 1.65), 3.1, 0.14, fill=False, edgecolor="tab:red"))
    axes.text(9.55, 2.55, "8 text positions", fontsize=7, ha="center", va="bottom")
    axes.text(11.75, 2.55, "64 image positions", fontsize=7, ha="center", va="bottom")
    axes.text(9.4, 1.5, "64 image positions", fontsize=7, ha="right", va="center", rotation=90)
    axes.text(11.05, 0.42, "red: the 72 weights of one image position", fontsize=7, ha="center", va="center")
    axes.text(8.4, 1.45, "keys,\nvalues", fontsize=7, ha="center", va="center")
    for start, end in (
        ((1.8, 2.9), (2.2, 2.9)),
        ((3.5, 2.9), (3.9, 2.9)),
        ((5.7, 3.0), (6.2, 3.6)),
        ((5.7, 2.8), (6.2, 1.9)),
        ((8.1, 3.65), (8.9, 3.65)),
        ((8.1, 1.8), (9.6, 2.42)),
    ):
        arrow(axes, start, end)
    return figure


def plot_attention_maps(
    images: Float[Tensor, "rows 3 h w"],
    maps: Float[Tensor, "rows length 8 8"],
    words: Sequence[str],
    row_labels: Sequence[str],
) -> Figure:
    """Return a figure of images and, next to each, of the attention to each token, all on one scale.

    maps: weights; the figure shows them as multiples of the equal share, 1 / (64 + L).
    """
    multiples = maps * (maps[0, 0].numel() + maps.shape[1])
    rows, columns = len(images), 1 + maps.shape[1]
    figure = Figure((0.95 * columns + 1.6, 0.95 * rows + 0.5), dpi=110, layout="constrained")
    grid = figure.subplots(rows, columns)
    for i in range(rows):
        grid[i, 0].imshow(((images[i].clamp(-1, 1) + 1) / 2).permute(1, 2, 0))
        grid[i, 0].set_ylabel(row_labels[i], fontsize=8)
        for j in range(maps.shape[1]):
            shown = grid[i, 1 + j].imshow(multiples[i, j], cmap="RdBu_r", norm=LogNorm(1 / 16, 16))
    for axes, title in zip(grid[0], [r"$\hat x_0$", *words], strict=True):
        axes.set_title(title, fontsize=8)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    ticks = [1 / 16, 1 / 4, 1, 4, 16]
    bar = figure.colorbar(shown, ax=grid, label="weight, in multiples of 1/72", shrink=0.8, ticks=ticks)
    bar.ax.set_yticklabels(["1/16", "1/4", "1", "4", "16"])
    bar.ax.minorticks_off()
    return figure


def plot_x_0_errors(path: str | Path) -> Figure:
    """Return a plot of the results of `x_0_error`: networks have solid lines, mean images dashed ones."""
    figure = Figure((6.4, 3.2), dpi=120, layout="constrained")
    axes = figure.subplots()
    for row in read_json(path)["rows"]:
        errors = {int(name[2:]): value for name, value in row.items() if name.startswith("t=")}
        style = ".-" if row["predicted_by"].startswith("predicted") else "--"
        axes.semilogy(list(errors), list(errors.values()), style, label=row["predicted_by"])
    axes.set(xlabel="t", ylabel=r"mean squared error of clipped $\hat x_0$")
    axes.legend(fontsize=8)
    return figure


def conditioning_table(ablation: str | Path, class_or_caption: str | Path) -> pd.DataFrame:
    """Return the results of `readers` and, from `class_or_caption`, of the index of the pair.

    The columns are the fractions of samples with the requested digit and colour, and the FID.
    """
    rows = read_json(ablation)["rows"]
    rows += [row for row in read_json(class_or_caption)["rows"] if row["told"] == "class"]
    table = pd.DataFrame(rows)
    table["conditioned on"] = [
        "pooled embedding and token states",
        "pooled embedding",
        "token states",
        "class index of the pair",
    ]
    held_out = table["held_out_both_accuracy"]
    # both_accuracy counts all 70 pairs, of which 10 are held out
    table["pairs from training"] = (table["both_accuracy"] - held_out / 7) * 7 / 6
    table = table.rename(columns={"held_out_both_accuracy": "held-out pairs", "fid": "FID"})
    return table[["conditioned on", "pairs from training", "held-out pairs", "FID"]]
