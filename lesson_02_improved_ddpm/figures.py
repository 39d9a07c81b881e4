"""Figures of improved_ddpm.ipynb that need more code than a cell should show."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.schedules import cosine_betas

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


def plot_stacked_bars(bars: Mapping[str, Mapping[str, float]], x_label: str) -> Figure:
    """Return a figure of horizontal bars. bars: name -> (part -> length), with the same parts in all."""
    figure = Figure((6.6, 0.9 + 0.35 * len(bars)), dpi=120, layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(bars))
    for part in next(iter(bars.values())):
        lengths = np.array([parts[part] for parts in bars.values()])
        axes.barh(range(len(bars)), lengths, left=left, height=0.6, label=part)
        left += lengths
    axes.set_yticks(range(len(bars)), list(bars))
    axes.invert_yaxis()
    axes.set_xlabel(x_label)
    figure.legend(loc="outside upper right", ncols=3, fontsize="small")
    return figure
