"""Labels of figures: characters that no font has, dollar signs, names that matplotlib would hide."""

import io
import warnings

import matplotlib
import pytest
import torch
from matplotlib import font_manager

from common import plotting
from common.plotting import plot_bars, plot_curves, plot_grid, printable, truncate

HARD = [
    "狗在跑",
    "a～b",
    "$5 and $6",
    "_hidden",
    "a\tb",
    "caf\udce9",
    "−1 ~ -2",
    "🐶",
    "e\u0301",
    "$x_{",
    "ok 👍🏽\ufe0f",
]


@pytest.fixture(autouse=True)
def only_the_fonts_of_matplotlib():
    with matplotlib.rc_context({"font.family": ["sans-serif"]}):
        plotting.use_fonts(())
        yield


def draw(figure):
    """Render the figure; a warning is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.savefig(io.BytesIO())


def glyphs(family):
    properties = font_manager.FontProperties(family=[family])
    return set(font_manager.get_font(font_manager.findfont(properties)).get_charmap())


@pytest.mark.parametrize("label", HARD)
def test_every_label_can_be_drawn_in_every_figure(label, capfd):
    grid = plot_grid(torch.zeros(1, 1, 8, 8), 1, row_labels=[label], column_labels=[label])
    curves = plot_curves({label: [(1, 1), (2, 2)], "b": [(1, 2), (2, 1)]}, "x", "y")
    bars = plot_bars({label: (1.0, 0.1), "b": (2.0, 0.1)}, "x")
    for figure in (grid, curves, bars):
        draw(figure)
    shown = [text.get_text() for text in curves.legends[0].get_texts()]
    assert shown == [truncate(label), "b"]
    assert [text.get_text() for text in bars.axes[0].get_yticklabels()] == [truncate(label), "b"]
    assert capfd.readouterr().err == ""


def test_a_missing_character_is_replaced_by_one_that_means_the_same_or_by_its_code():
    assert printable("狗 a") == "\\u72d7 a"
    assert printable("ａ～b") == "a~b"
    assert printable("caf\udce9\t") == "caf\\udce9\\t"
    assert printable("e\u0301 ~ - −") == "é ~ - −"
    assert {ord(c) for c in "".join(map(printable, HARD))} <= glyphs("DejaVu Sans")


def test_a_fallback_font_shows_the_character_itself():
    code = min(c for c in glyphs("STIXGeneral") - glyphs("DejaVu Sans") if c > 0x2000)
    assert chr(code) not in printable(chr(code))
    plotting.use_fonts(["No Such Font", "STIXGeneral"])
    assert "No Such Font" not in matplotlib.rcParams["font.family"]
    assert printable(chr(code)) == chr(code)
    draw(plot_bars({chr(code): (1.0, 0.1)}, "x"))


def test_wide_characters_get_room():
    widths = [
        plot_grid(torch.zeros(1, 1, 8, 8), 1, row_labels=[label]).get_size_inches()[0] for label in "a狗"
    ]
    assert widths[1] > widths[0]
    assert plotting.text_width("狗a") == 3
