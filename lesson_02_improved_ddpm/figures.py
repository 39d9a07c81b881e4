"""Figures of improved_ddpm.ipynb that need more code than a cell should show."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.schedules import cosine_betas

Positions = Sequence[Mapping[str, float]]  # kind of pixel -> f, at several timesteps
MEANS, STD = torch.tensor([-1.0, 1.0]), 0.2  # of the two peaks of a one-dimensional distribution


def two_peaks_denoiser(diffusion: GaussianDiffusion) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the ideal denoiser of an equal mixture of two Gaussians, for numbers x_t [N, 1, 1, 1]."""

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        a = diffusion.alpha_bar[t].float().view(-1, 1)
        means, variance = a.sqrt() * MEANS, a * STD**2 + 1 - a
        weights = (-((x_t.flatten(1) - means) ** 2) / (2 * variance)).softmax(1)
        score = (weights * (means - x_t.flatten(1)) / variance).sum(1)
        return (-(1 - a).sqrt().flatten() * score).view_as(x_t)

    return denoiser


def sample_paths(eta: float, n: int = 12, steps: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """Return timesteps [S + 1] and paths [S + 1, n] of sampling from two peaks with `ddim_sample`."""
    whole = GaussianDiffusion(cosine_betas(1000))
    process, denoiser = whole.respace_evenly(steps), two_peaks_denoiser(whole)
    x_T = torch.linspace(-2, 2, n).view(-1, 1, 1, 1)
    generator = torch.Generator().manual_seed(0)
    trajectory = list(ddim_sample(process, denoiser, x_T, generator, eta=eta, denoised_fn=None))
    paths = [step.x_t.flatten() for step in trajectory] + [trajectory[-1].x_prev.flatten()]
    return np.append(process.timesteps.flip(0).numpy(), 0), torch.stack(paths).numpy()


def plot_paths(axes: Axes, eta: float, title: str) -> None:
    """Plot sampling paths of a distribution with two peaks over its marginals, from noise (left) to data."""
    whole = GaussianDiffusion(cosine_betas(1000))
    x = torch.linspace(-2.8, 2.8, 200)
    a = whole.alpha_bar.float()[:, None, None]
    variance = a * STD**2 + 1 - a
    density = (-((x - a.sqrt() * MEANS[:, None]) ** 2) / (2 * variance)).exp() / variance.sqrt()
    axes.imshow(
        density.mean(1).T.sqrt(), extent=(0, 1000, -2.8, 2.8), origin="lower", aspect="auto", cmap="Blues"
    )
    timesteps, paths = sample_paths(eta)
    axes.plot(timesteps, paths, color="tab:orange", linewidth=0.8)
    axes.set(title=title, xlabel="t", xlim=(1000, 0))


def plot_schedules(schedules: Mapping[str, Tensor]) -> Figure:
    """Return a figure of sqrt(alpha_bar), the factor of the image, for several schedules of betas."""
    figure = Figure((5, 2.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    for name, betas in schedules.items():
        axes.plot((1 - betas).cumprod(0).sqrt(), label=name)
    axes.set(xlabel="t", ylabel=r"$\sqrt{\bar\alpha_t}$")
    axes.legend()
    return figure


def plot_f(timesteps: Sequence[int], panels: Mapping[str, tuple[Positions, Positions]]) -> Figure:
    """Return a figure of f, the variance's position between its limits. panels: title -> (learned, best)."""
    figure = Figure((9, 3), dpi=120, layout="constrained")
    all_axes, x = figure.subplots(1, len(panels), sharey=True), [t + 1 for t in timesteps]
    for axes, (title, (learned, best)) in zip(all_axes, panels.items()):
        for kind, color in (("background", "tab:blue"), ("strokes", "tab:orange")):
            axes.semilogx(x, [f[kind] for f in learned], ".-", color=color, label=f"{kind}, learned")
            axes.semilogx(x, [f[kind] for f in best], "--", color=color, label=f"{kind}, best")
        axes.set(title=title, xlabel="t + 1", ylim=(-0.5, 1.5))
    all_axes[0].set_ylabel("f")
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize="small")
    return figure


def std_of_samples(
    process: GaussianDiffusion, variance: Callable[[GaussianDiffusion, int, Tensor], Tensor], std: float = 0.5
) -> float:
    """Return the standard deviation of ancestral samples of Gaussian pixels, predicted by the exact mean.

    variance: (process, i, mean squared error of x_0_hat) -> variance of the step. std: of the data.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40_000, generator=generator)
    for i in reversed(range(process.num_timesteps)):
        t, a = torch.full((len(x),), i), process.alpha_bar[i]
        total = a * std**2 + 1 - a  # the variance of x_t
        x_0_hat = (a.sqrt() * std**2 / total).float() * x
        error = std**2 * (1 - a) / total
        x = process.q_posterior_mean(x_0_hat, x, t)
        if i > 0:
            x = x + float(variance(process, i, error)) ** 0.5 * torch.randn(len(x), generator=generator)
    return x.std().item()
