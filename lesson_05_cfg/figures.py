"""Figures of cfg.ipynb and fast_sampling.ipynb that need more code than a cell should show."""

from matplotlib.figure import Figure

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


def plot_sweep(path: str = "results/guidance_curve.json") -> Figure:
    """Return plots of accuracy, FID and diversity against the guidance scale, from s = 1 on."""
    rows = [row for row in read_json(path)["rows"] if row["denoised_fn"] == "clip" and row["scale"] >= 1]
    scales = [row["scale"] for row in rows]
    figure = Figure((8.5, 2.6), dpi=120, layout="constrained")
    panels = figure.subplots(1, 3)
    for name, label in (("digit_accuracy", "digit"), ("colour_accuracy", "color")):
        panels[0].plot(scales, [row[name] for row in rows], "o-", markersize=4, label=f"{label} correct")
    panels[0].legend()
    for axes, name, label in zip(panels[1:], ("fid", "diversity"), ("FID", "diversity")):
        axes.plot(scales, [row[name] for row in rows], "o-", markersize=4)
        axes.set_ylabel(label)
    panels[1].set_yscale("log")
    panels[2].axhline(1, color="black", linestyle=":")
    for axes in panels:
        axes.set_xscale("log")
        axes.set_xticks((1, 2, 3, 4, 7, 10, 20), ("1", "2", "3", "4", "7", "10", "20"))
        axes.minorticks_off()
        axes.set_xlabel("guidance scale s")
    return figure


def plot_extrapolation() -> Figure:
    """Return a diagram of DPM-Solver++(2M): the line through two predictions, followed into the step."""
    before, now, end, slope = 0.0, 1.0, 2.4, 0.35
    figure = Figure((6, 2.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    axes.axvspan(now, end, color=HIGHLIGHT, alpha=0.5)
    axes.plot((before, end), (0, slope * (end - before)), "k--", linewidth=1)
    axes.plot((before, now), (0, slope * (now - before)), "o", color="tab:blue", markersize=8)
    middle = (now + end) / 2
    axes.plot(middle, slope * (middle - before), "s", color="tab:orange", markersize=8)
    for x, text in ((before, "prediction of the\nstep before"), (now, "current\nprediction")):
        axes.annotate(text, (x, slope * x), (-4, 12), textcoords="offset points", ha="right", fontsize=9)
    label = "$\\hat x_m$, used for\nthe whole step"
    axes.annotate(label, (middle, slope * middle), (8, -26), textcoords="offset points", fontsize=9)
    ticks = (
        r"$\lambda_1 - h_\mathrm{before}$",
        r"$\lambda_1$",
        r"$\lambda_m$",
        r"$\lambda_2 = \lambda_1 + h$",
    )
    axes.set_xticks((before, now, middle, end), ticks)
    axes.set(yticks=(), ylabel=r"$\hat x_0$", xlim=(-0.9, 2.9), ylim=(-0.15, 1.0))
    return figure
