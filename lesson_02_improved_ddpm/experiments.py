"""Measure lesson 2: python lesson_02_improved_ddpm/experiments.py NAME

NAME is one of
    objectives      linear and cosine schedule with L_simple, L_hybrid and L_vlb: bits/dim and FID
    few_steps       fixed variances, learned variance and DDIM at 5 to 250 steps
    lesson_1_bits   bits/dim of lesson 1's network with either fixed variance
    gradient_noise  the gradient of L_vlb with uniform and with importance-sampled t
    mistakes        the classic bugs, each trained next to the correct version

Each writes results/NAME.json and NAME.png. An interrupted experiment continues with the missing rows.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.cli import run_command
from common.device import pick_device
from common.digits.evaluation import reference_for
from common.digits.mnist import Digits, load_splits
from common.plotting import plot_bars, plot_curves
from common.protocols import Denoiser, Loss, LossAtT, Sampler
from common.results.experiments import (
    ExperimentConfig,
    by_name,
    open_table,
    run_experiment,
    run_folder,
    sample_metrics,
    save_figure,
    save_image_rows,
    save_losses,
    train_variant,
    with_default_steps,
)
from common.results.table import Row
from common.sampling import sample_batches
from lesson_01_ddpm import model as lesson_1
from lesson_01_ddpm.diffusion import GaussianDiffusion, ddpm_sample, fixed_large, fixed_small, training_loss
from lesson_02_improved_ddpm.ddim import SAMPLERS, ddim_sample
from lesson_02_improved_ddpm.importance_sampling import ImportanceSampledLoss
from lesson_02_improved_ddpm.mistakes import leaking_hybrid, swapped_range, unmapped, weighted_hybrid
from lesson_02_improved_ddpm.model import (
    IMAGE_SHAPE,
    LESSON,
    SCHEDULES,
    UNET_CONFIG,
    build_model,
    load,
    make_diffusion,
)
from lesson_02_improved_ddpm.train_mnist import LOSSES, make_loss
from lesson_02_improved_ddpm.variational_bound import bits_per_dim, learned_range, loss_hybrid, loss_vlb

SHOWN_STEPS = 100  # sampling steps where samples are compared
STEPS = (5, 10, 25, 50, 100, 250)  # sampling steps of `few_steps`
BATCHES = 50  # whose gradients `gradient_noise` compares
HISTORY = 10  # losses at each t that importance sampling remembers
NUM_VALIDATION = 512  # images of the validation loss
COLUMN_TITLES = {"steps": "sampling steps", "bits_per_dim_error": ("error", ".2f")}


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def sample(
    denoiser: Denoiser,
    process: GaussianDiffusion,
    n: int,
    config: ExperimentConfig,
    sampler: Sampler = SAMPLERS["ddpm"],
) -> Float[Tensor, "{n} 1 32 32"]:
    """Draw n digits in as many steps as the process has."""
    return sample_batches(
        partial(sampler, process),
        lambda indices: denoiser,
        IMAGE_SHAPE,
        n,
        seed=config.seed,
        device=config.device,
    )


def measure_bits(
    network: nn.Module, process: GaussianDiffusion, digits: Digits, config: ExperimentConfig, **kwargs: Any
) -> Row:
    """Return the bits/dim of validation digits and their error. kwargs: for `bits_per_dim`."""
    images = digits.images[: config.num_samples].to(pick_device(config.device))
    torch.manual_seed(config.seed)
    return bits_per_dim(process, network, images.split(250), draws=4, **kwargs)._asdict()


def train_digits(
    config: ExperimentConfig, data: tuple[Digits, Digits], variant: str, loss: Loss, channels: int = 2
) -> nn.Module:
    """Train one variant and return its averaged network. channels: of its output."""
    torch.manual_seed(config.seed)
    network = build_model(replace(UNET_CONFIG, out_channels=channels)).network
    validation = data[1].batch(torch.arange(NUM_VALIDATION))
    return train_variant(LESSON, config, variant, network, loss, data[0], validation)


def uniform_loss(loss: LossAtT, diffusion: GaussianDiffusion) -> Loss:
    """Return the training loss (network, x_0, label) -> [N] of a loss at uniform t; the label is ignored."""
    return lambda network, x_0, label=None: training_loss(loss, diffusion, network, x_0)


def objectives(config: ExperimentConfig) -> None:
    """Compare schedules and losses in bits/dim and FID (Nichol & Dhariwal 2021, tables 1 and 2)."""
    config = with_default_steps(config)
    table = open_table(LESSON, config)
    data = load_splits(config.dataset, config.data_dir)
    reference, shown = reference_for(data[0]), {}

    def measure(network: nn.Module, diffusion: GaussianDiffusion) -> Row:
        samples = sample(network, diffusion.respace_evenly(SHOWN_STEPS), config.num_samples, config)
        return sample_metrics(samples, reference) | measure_bits(network, diffusion, data[1], config)

    for schedule in SCHEDULES:
        for objective in LOSSES:
            name, diffusion = f"{schedule}, {objective}", make_diffusion(schedule)
            channels = 1 if objective == "simple" else 2
            network = train_digits(config, data, name, make_loss(objective, diffusion), channels)
            table.row(partial(measure, network, diffusion), schedule=schedule, objective=objective)
            shown[name] = sample(network, diffusion.respace_evenly(SHOWN_STEPS), 16, config)
    save_image_rows(table, shown)


def few_steps(config: ExperimentConfig) -> None:
    """Compare variances and DDIM at few sampling steps (Nichol & Dhariwal 2021, figure 8)."""
    config = with_default_steps(config)
    table = open_table(LESSON, config, weights_of=LESSON)
    reference = reference_for(load_splits(config.dataset, config.data_dir)[0])
    network, diffusion, _ = load(device=config.device)
    samplers: dict[str, Sampler] = {
        "fixed small": partial(ddpm_sample, log_variance_fn=fixed_small),
        "fixed large": partial(ddpm_sample, log_variance_fn=fixed_large),
        "learned": partial(ddpm_sample, log_variance_fn=learned_range),
        "DDIM": ddim_sample,
    }
    curves: dict[str, list[tuple[float, float]]] = {name: [] for name in samplers}

    def measure(sampler: Sampler, steps: int) -> Row:
        process = diffusion.respace_evenly(steps)
        return sample_metrics(sample(network, process, config.samples_at(steps), config, sampler), reference)

    for name, sampler in samplers.items():
        for steps in STEPS:
            row = table.row(partial(measure, sampler, steps), sampler=name, steps=steps)
            curves[name].append((steps, row["fid"] - row["fid_floor"]))
    save_figure(table, plot_curves(curves, "steps", "FID above that of real digits"))


def lesson_1_bits(config: ExperimentConfig) -> None:
    """Compare lesson 1's two variances in bits/dim; in samples of 1000 steps they do not differ."""
    config = with_default_steps(config)
    table = open_table(LESSON, config, weights_of=lesson_1.LESSON)
    _, digits = load_splits(config.dataset, config.data_dir)
    network, diffusion, _ = lesson_1.load(device=config.device)
    bits = {}
    for name, variance in by_name((fixed_small, fixed_large)).items():
        measure = partial(measure_bits, network, diffusion, digits, config, log_variance_fn=variance)
        row = table.row(measure, variance=name)
        bits[name] = (row["bits_per_dim"], row["bits_per_dim_error"])
    save_figure(table, plot_bars(bits, "bits per dimension of lesson 1's network"))


def gradient_noise(config: ExperimentConfig) -> None:
    """Measure how noisy L_vlb's gradient is (Nichol & Dhariwal 2021, section 3.3)."""
    config = with_default_steps(config)
    table = open_table(LESSON, config, weights_of=LESSON)
    digits, _ = load_splits(config.dataset, config.data_dir)
    network, diffusion, _ = load(device=config.device)
    network.requires_grad_(True)
    importance_sampled = ImportanceSampledLoss(loss_vlb, diffusion, HISTORY)

    def images_at(indices: Int[Tensor, "n"]) -> Float[Tensor, "n 1 32 32"]:
        return digits.images[indices].to(pick_device(config.device))

    def gradient(loss: Loss, indices: Int[Tensor, "n"]) -> Float[Tensor, "p"]:
        network.zero_grad()
        loss(network, images_at(indices)).mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])

    def measure(loss: Loss) -> Row:
        torch.manual_seed(config.seed)
        indices = torch.randint(len(digits), (BATCHES, 64))
        gradients = torch.stack([gradient(loss, i) for i in indices])
        mean = gradients.mean(0)
        noise = (gradients - mean).square().sum(1).mean() / mean.square().sum()
        return {"batches": BATCHES, "noise_to_signal": noise.item()}

    table.row(partial(measure, uniform_loss(loss_vlb, diffusion)), t="uniform")
    while importance_sampled.counts.min() < HISTORY:  # fill the history before it is used
        t = importance_sampled.counts.argsort()[:250]
        x_0 = images_at(torch.randint(len(digits), (250,)))
        with torch.no_grad():
            losses = loss_vlb(diffusion, network, x_0, t, torch.randn_like(x_0))
        importance_sampled.update_history(t, losses.cpu().double())
    table.row(partial(measure, importance_sampled), t="by importance")
    curve = list(enumerate(importance_sampled.probabilities().tolist(), 1))
    save_figure(table, plot_curves({"p_t by importance": curve}, "t + 1", "probability"))


def mistakes(config: ExperimentConfig) -> None:
    """Compare each bug with the correct version, in bits/dim and in samples."""
    config = with_default_steps(config, 1000)
    table = open_table(LESSON, config)
    data = load_splits(config.dataset, config.data_dir)
    reference, diffusion = reference_for(data[0]), make_diffusion()
    few = diffusion.respace_evenly(SHOWN_STEPS)
    losses = {
        "correct": loss_hybrid,
        "VLB weight 1000 times too small": weighted_hybrid(0.001),
        "VLB weight 1000 times too large": weighted_hybrid(1000.0),
        "VLB also trains eps_hat": leaking_hybrid,
    }
    networks = {
        name: train_digits(config, data, name, uniform_loss(loss, diffusion)) for name, loss in losses.items()
    }
    correct = networks["correct"]
    samplers = {name: partial(sample, network, few) for name, network in networks.items()}
    samplers["index instead of timestep"] = partial(sample, unmapped(few, correct), few)
    samplers["limits of variance swapped"] = partial(
        sample, correct, few, sampler=partial(ddpm_sample, log_variance_fn=swapped_range)
    )

    def measure(name: str) -> Row:
        kwargs = {"log_variance_fn": swapped_range} if name == "limits of variance swapped" else {}
        bits = measure_bits(networks.get(name, correct), diffusion, data[1], config, **kwargs)
        return sample_metrics(samplers[name](config.num_samples, config), reference) | bits

    for name in samplers:
        table.row(partial(measure, name), mistake=name)
    save_image_rows(table, {name: draw(16, config) for name, draw in samplers.items()})
    save_losses(table, {name: run_folder(LESSON, config, name) for name in losses})


EXPERIMENTS = by_name((objectives, few_steps, lesson_1_bits, gradient_noise, mistakes))

if __name__ == "__main__":
    run_command(partial(run_experiment, EXPERIMENTS), Config)
