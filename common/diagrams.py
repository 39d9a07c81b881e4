"""Diagrams drawn by code: boxes and arrows, and the map of the series that opens every lesson."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

HIGHLIGHT, PLAIN, EDGE = "#ffd37f", "#eef1f5", "#5b6673"
LESSONS = [
    ("1 DDPM", "noise, denoise,\nsample"),
    ("2 Improved DDPM", "schedule, variance,\nfewer steps"),
    ("3 ADM", "ADM's UNet,\nclasses, the score"),
    ("4 Text", "captions in\nthe UNet"),
    ("5 Guidance", "follow the\ncaption"),
    ("6 miniGLIDE", "64x64 photos,\nupsampling, editing"),
]


def box(
    axes: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    colour: str = PLAIN,
    size: float = 8,
) -> None:
    """Draw a rounded box with its lower left corner at (x, y) and a text in its middle."""
    style = "round,pad=0,rounding_size=0.06"
    axes.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor=EDGE))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size)


def arrow(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    text: str = "",
    colour: str = EDGE,
    dashed: bool = False,
) -> None:
    """Draw an arrow, with an optional text above its middle."""
    style = {
        "arrowstyle": "->",
        "color": colour,
        "linestyle": "--" if dashed else "-",
        "shrinkA": 0,
        "shrinkB": 0,
    }
    axes.annotate("", end, start, arrowprops=style)
    if text:
        middle = ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2 + 0.08)
        axes.text(*middle, text, ha="center", va="bottom", fontsize=7, color=colour)


def canvas(width: float, height: float, x_limit: float, y_limit: float) -> tuple[Figure, Axes]:
    """Return an empty figure of this size in inches, with coordinates from (0, 0) to the limits."""
    figure = Figure((width, height), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, x_limit), ylim=(0, y_limit))
    axes.axis("off")
    return figure, axes


def plot_series(lit: int, lessons: Sequence[tuple[str, str]] = LESSONS) -> Figure:
    """Return a map of the series in which lesson `lit` (1 to 6) is highlighted."""
    figure, axes = canvas(9, 1.1, 6 * 1.6, 1.2)
    for i, (title, content) in enumerate(lessons):
        x = 1.6 * i + 0.05
        box(axes, x, 0.15, 1.4, 0.9, "", HIGHLIGHT if i + 1 == lit else PLAIN)
        axes.text(x + 0.7, 0.86, title, ha="center", va="center", fontsize=8, weight="bold")
        axes.text(x + 0.7, 0.45, content, ha="center", va="center", fontsize=7)
        if i:
            arrow(axes, (x - 0.2, 0.6), (x, 0.6))
    return figure
