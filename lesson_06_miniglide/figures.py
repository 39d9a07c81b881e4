"""Figures and tables of lesson 6's notebooks that need more code than a cell should show."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from common.diagrams import HIGHLIGHT, arrow, box, canvas
from common.files import read_json
from common.images import to_pixels
from common.plotting import plot_grid, wrap
from lesson_06_miniglide.model import build_network, parameter_counts
from lesson_06_miniglide.networks.presets import PRESETS
from lesson_06_miniglide.shapes.checker import matches_caption

FINE_TUNED = "#b9d7f0"


def plot_system() -> Figure:
    """Return a diagram of GLIDE: from the caption to 64x64 pixels, and from there to 256x256."""
    figure, axes = canvas(9, 2.9, 12.4, 4.0)
    box(axes, 0.1, 2.5, 1.5, 0.8, "caption")
    box(axes, 2.1, 2.5, 1.5, 0.8, "tokenizer\n(lesson 4)")
    box(axes, 4.1, 2.5, 1.9, 0.8, "text transformer\n(lesson 4)", FINE_TUNED)
    box(axes, 6.6, 2.5, 2.6, 0.8, "base UNet, 64x64\n(lessons 1 to 4)", FINE_TUNED)
    box(axes, 9.8, 2.5, 2.4, 0.8, "upsampler, 256x256\n(upsampling.ipynb)")
    box(axes, 6.6, 0.7, 2.6, 0.8, "guided sampler\n(lesson 5; section 6)", HIGHLIGHT)
    box(axes, 0.1, 0.7, 1.5, 0.8, "captioned\nimages")
    box(axes, 2.1, 0.7, 1.5, 0.8, "batches\n(section 3)", HIGHLIGHT)
    box(axes, 4.1, 0.7, 1.9, 0.8, "schedule, loss\n(sections 4, 6)", HIGHLIGHT)
    for start, end in (
        ((1.6, 2.9), (2.1, 2.9)),
        ((3.6, 2.9), (4.1, 2.9)),
        ((6.0, 2.9), (6.6, 2.9)),
        ((9.2, 2.9), (9.8, 2.9)),
        ((1.6, 1.1), (2.1, 1.1)),
        ((3.6, 1.1), (4.1, 1.1)),
        ((5.05, 1.5), (5.05, 2.5)),
        ((6.0, 1.4), (7.0, 2.5)),
        ((7.9, 1.5), (7.9, 2.5)),
    ):
        arrow(axes, start, end)
    return figure


def plot_checked(images: Float[Tensor, "n 3 64 64"], captions: Sequence[str]) -> Figure:
    """Return a row of samples, with a red frame around each that does not show its caption."""
    figure = plot_grid(images, len(images), column_labels=captions, scale=2)
    for i, (pixels, caption) in enumerate(zip(to_pixels(images), captions)):
        if not matches_caption(pixels, caption):
            frame = Rectangle((66 * i + 1, 1), 64, 64, fill=False, edgecolor="red", linewidth=3)
            figure.axes[0].add_patch(frame)
    return figure


def parameter_table(presets: Sequence[str]) -> pd.DataFrame:
    """Return the number of parameters of each part of the networks of these presets."""
    counts = {}
    with torch.device("meta"):  # shapes without memory
        for name in presets:
            preset = PRESETS[name]
            network = build_network(preset, preset.network, preset.text, torch.ones(1000))
            counts[name] = parameter_counts(network)
    return pd.DataFrame(counts).map("{:,}".format)


def flops_with_patches(size: int, on_patches: Callable[..., Tensor]) -> int:
    """Return the FLOPs of one evaluation of `tiny` for one image, with patches of size x size pixels.

    on_patches: (network, x_t, t, size) -> the output of a network that sees patches. The heads have 16
    channels instead of 32, which divide the channels of every level at each patch size. The width of the
    heads does not change the FLOPs.
    """
    tiny = PRESETS["tiny"]
    with torch.device("meta"):
        config = replace(
            tiny.network,
            image_size=64 // size,
            in_channels=3 * size**2,
            out_channels=6 * size**2,
            patch_size=1,
            num_head_channels=16,
        )
        network = build_network(tiny, config, tiny.text, torch.ones(1000))
        text = network.encode_text(torch.zeros(1, 24).long(), torch.ones(1, 24).bool())  # type: ignore[operator]
        with FlopCounterMode(display=False) as counter:
            on_patches(partial(network, text=text), torch.randn(1, 3, 64, 64), torch.zeros(1).long(), size)
    return counter.get_total_flops()


KINDS = {"single": "single shape", "count": "count", "pair": "two shapes, any arrangement"}


def plot_guidance_scales(path: str) -> Figure:
    """Return a plot of how many captions of each kind are correct against the guidance scale."""
    rows = sorted(read_json(path)["rows"], key=lambda row: row["guidance_scale"])
    scales = [row["guidance_scale"] for row in rows]
    figure = Figure((5.5, 2.9), dpi=120, layout="constrained")
    axes = figure.subplots()

    def plot(name: str, n: int, label: str, style: str) -> None:
        p = [row[f"{name}_accuracy"] for row in rows]
        errors = [(q * (1 - q) / n) ** 0.5 for q in p]
        axes.errorbar(scales, p, errors, fmt=style, capsize=3, label=f"{label} (n = {n})")

    for name, label in KINDS.items():
        plot(name, rows[0][f"n_{name}"], label, "o-")
    plot("caption", rows[0]["n"], "all captions", "ko--")
    axes.set(xlabel="guidance scale s", ylabel="correct", ylim=(0, 1.1), xticks=scales)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    return figure


def relation_table(path: str) -> pd.DataFrame:
    """Return, by guidance scale, how the two shapes are arranged where both are right."""
    rows: Sequence[Mapping] = sorted(read_json(path)["rows"], key=lambda row: row["guidance_scale"])
    table = {
        f"s = {row['guidance_scale']}": {
            "captions with two shapes": row["n_pair"],
            "both shapes right": row["relation_correct"]
            + row["relation_opposite"]
            + row["relation_other_axis"],
            "of these: as the caption says": row["relation_correct"],
            "reversed (right instead of left)": row["relation_opposite"],
            "on the wrong axis (above instead of left)": row["relation_other_axis"],
            "shapes and arrangement right, of all": f"{row['relation_correct'] / row['n_pair']:.0%}",
        }
        for row in rows
    }
    return pd.DataFrame(table)


def plot_errata(path: str, captions: Sequence[str]) -> Figure:
    """Return the first stored samples of the variants of ERRATA.md, with their captions above the columns."""
    left, width = 268, 118  # pixels of the row labels, and of each column
    stored = Image.open(path)
    image = stored.crop((0, 0, left + width * len(captions) + 2, stored.height))
    figure = Figure((image.width / 150, image.height / 150 + 0.55), dpi=150)
    height = image.height / 150 / figure.get_size_inches()[1]
    axes = figure.add_axes((0, 0, 1, height))
    axes.imshow(image)
    axes.axis("off")
    for i, caption in enumerate(captions):
        x = (left + width * (i + 0.5)) / image.width
        figure.text(x, height - 0.01, wrap(caption, 12), fontsize=5.5, ha="center", va="bottom")
    return figure
