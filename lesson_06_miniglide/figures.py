"""Figures of lesson 6's notebooks that need more code than a cell should show."""

from matplotlib.figure import Figure

from common.diagrams import HIGHLIGHT, arrow, box, canvas
from common.files import read_json


def plot_system() -> Figure:
    """Return a diagram of GLIDE: from the caption to 64x64 pixels, and from there to 256x256."""
    figure, axes = canvas(9, 2.9, 12.4, 4.0)
    box(axes, 0.1, 2.5, 1.5, 0.8, "caption")
    box(axes, 2.1, 2.5, 1.5, 0.8, "tokenizer\n(lesson 4)")
    box(axes, 4.1, 2.5, 1.9, 0.8, "text transformer\n(lesson 4)")
    box(axes, 6.6, 2.5, 2.6, 0.8, "base UNet, 64x64\n(lessons 1 to 4)", HIGHLIGHT)
    box(axes, 9.8, 2.5, 2.4, 0.8, "upsampler, 256x256\n(upsampling.ipynb)")
    box(axes, 6.6, 0.7, 2.6, 0.8, "guided sampler\n(lessons 2 and 5)")
    box(axes, 0.1, 0.7, 1.5, 0.8, "folder of\nphotos", HIGHLIGHT)
    box(axes, 2.1, 0.7, 1.5, 0.8, "memory map", HIGHLIGHT)
    box(axes, 4.1, 0.7, 1.9, 0.8, "training", HIGHLIGHT)
    for start, end in (
        ((1.6, 2.9), (2.1, 2.9)),
        ((3.6, 2.9), (4.1, 2.9)),
        ((6.0, 2.9), (6.6, 2.9)),
        ((9.2, 2.9), (9.8, 2.9)),
        ((1.6, 1.1), (2.1, 1.1)),
        ((3.6, 1.1), (4.1, 1.1)),
        ((6.0, 1.3), (7.0, 2.5)),
        ((7.9, 1.5), (7.9, 2.5)),
    ):
        arrow(axes, start, end)
    return figure


KINDS = {"single": "single shape", "count": "count", "pair": "two shapes, any arrangement"}


def plot_guidance_scales(path: str) -> Figure:
    """Return a plot of how many captions of each kind are correct against the guidance scale."""
    rows = read_json(path)["rows"]
    rows = [row for row in rows if row["guidance"] == "classifier-free" or row["scale"] == 0]
    scales = [row["scale"] if row["guidance"] == "classifier-free" else 1 for row in rows]
    figure = Figure((5.5, 2.8), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, label in KINDS.items():
        axes.plot(scales, [row[f"{name}_accuracy"] for row in rows], "o-", label=label)
    axes.plot(scales, [row["caption_accuracy"] for row in rows], "ko--", label="all captions")
    axes.set(xlabel="guidance scale s", ylabel="correct", ylim=(0, 1.1))
    axes.legend(fontsize=7, loc="lower right", ncols=2)
    return figure
