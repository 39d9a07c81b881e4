"""Measure lesson 1: python lesson_01_ddpm/experiments.py NAME

NAME is one of
    variances       fixed small and large variance at 10 to 1000 sampling steps
    along_training  FID and loss of the averaged weights at several steps of one training run
    ema             the weights of one training run, averaged over more or fewer steps, or not at all
    neighbours      samples and the training digits that are nearest to them
    mistakes        the classic bugs, each trained next to the correct version
    metric_errors   how much FID and KID vary between sets of equally many digits (error_study.py)

Each writes results/NAME.json and NAME.png. An interrupted experiment continues with the missing rows.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.cli import run_command
from common.digits.evaluation import reference_for
from common.digits.mnist import Digits, load_splits
from common.files import write_atomically
from common.plotting import plot_curves, plot_grid
from common.protocols import Denoiser, Images, Loss, LossAtT, Sampler
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
from common.results.table import ResultsTable, Row
from common.sampling import sample_batches
from common.training.checkpoints import latest_checkpoint
from common.training.metrics_csv import read_metrics
from lesson_01_ddpm.diffusion import ddpm_sample, fixed_large, fixed_small, loss_simple, training_loss
from lesson_01_ddpm.error_study import metric_errors
from lesson_01_ddpm.mistakes import (
    AveragingLoss,
    loss_unscaled,
    loss_without_t,
    sample_with_final_noise,
    with_next_t,
    without_t,
)
from lesson_01_ddpm.model import IMAGE_SHAPE, LESSON, build_model, load, make_diffusion

SHOWN_STEPS = 100  # sampling steps where samples are compared
STEPS = (10, 25, 50, 100, 250, 1000)  # sampling steps of `variances`
DECAYS = (0.0, 0.9, 0.99, 0.995, 0.999, 0.9995)  # of the averages that `ema` compares
NUM_VALIDATION = 512  # images of the validation loss
COLUMN_TITLES = {"steps": "sampling steps", "step": "training step", "loss": "validation loss"}

Samplers = Mapping[str, Callable[[int], Tensor]]  # name -> (n -> samples)


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def sample(
    denoiser: Denoiser, config: ExperimentConfig, steps: int, n: int, sampler: Sampler = ddpm_sample
) -> Float[Tensor, "{n} 1 32 32"]:
    """Draw n digits in `steps` sampling steps."""
    sampler = partial(sampler, make_diffusion().respace_evenly(steps))
    return sample_batches(
        sampler, lambda indices: denoiser, IMAGE_SHAPE, n, seed=config.seed, device=config.device
    )


def compare(
    table: ResultsTable, digits: Digits, config: ExperimentConfig, column: str, samplers: Samplers
) -> None:
    """Add one row and show one line of samples per sampler. column: of the samplers' names."""
    reference = reference_for(digits)

    def measure(draw: Callable[[int], Tensor]) -> Row:
        return sample_metrics(draw(config.num_samples), reference)

    for name, draw in samplers.items():
        table.row(partial(measure, draw), **{column: name})
    save_image_rows(table, {name: draw(16) for name, draw in samplers.items()})


def make_loss(loss: LossAtT = loss_simple) -> Loss:
    """Return the training loss (network, x_0, label) -> [N] of a loss at t; the label is ignored."""
    diffusion = make_diffusion()
    return lambda network, x_0, label: training_loss(loss, diffusion, network, x_0)


def new_network(config: ExperimentConfig) -> nn.Module:
    """Return an untrained network, the same for the same seed."""
    torch.manual_seed(config.seed)
    return build_model().network


def train_digits(
    config: ExperimentConfig, data: tuple[Digits, Digits], variant: str, loss: Loss, **kwargs: Any
) -> nn.Module:
    """Train one variant and return its averaged network. kwargs: for `train_variant`."""
    validation = data[1].batch(torch.arange(NUM_VALIDATION))
    kwargs["metadata"] = build_model().metadata
    return train_variant(LESSON, config, variant, new_network(config), loss, data[0], validation, **kwargs)


def variances(config: ExperimentConfig) -> None:
    """Show that the better fixed variance depends on the steps (Nichol & Dhariwal 2021, section 3.1)."""
    config = with_default_steps(config)
    table = open_table(LESSON, config, weights_of=LESSON)
    reference = reference_for(load_splits(config.dataset, config.data_dir)[0])
    network = load(device=config.device).network
    curves: dict[str, list[tuple[float, float]]] = {}

    def measure(sampler: Sampler, steps: int) -> Row:
        return sample_metrics(sample(network, config, steps, config.samples_at(steps), sampler), reference)

    for label, log_variance_fn in {"β̃ (fixed_small)": fixed_small, "β (fixed_large)": fixed_large}.items():
        curves[label], sampler = [], partial(ddpm_sample, log_variance_fn=log_variance_fn)
        for steps in STEPS:
            row = table.row(partial(measure, sampler, steps), variance=log_variance_fn.__name__, steps=steps)
            curves[label].append((steps, row["fid"] - row["fid_floor"]))
    save_figure(table, plot_curves(curves, "sampling steps", "FID above that of real digits"))


def train_once(
    config: ExperimentConfig, data: tuple[Digits, Digits]
) -> tuple[nn.Module, AveragingLoss, Path]:
    """Train the run that `along_training` and `ema` share.

    Returns the averaged network, the loss with further averages, and a folder: right/ in it is the run, and
    snapshots/step_*.safetensors are the averaged weights at every 500 steps.
    """
    folder = run_folder(LESSON, config, group="one_training")
    (folder / "snapshots").mkdir(parents=True, exist_ok=True)

    def keep_weights(network: nn.Module) -> Figure:
        """Copy the latest checkpoint; previews are not made for the one of a run that is interrupted."""
        latest = latest_checkpoint(folder / "right", "safetensors", "--out")
        write_atomically(folder / "snapshots" / latest.name, lambda part: copyfile(latest, part))
        return plot_grid(sample(network, config, 10, 16))

    loss = AveragingLoss(make_loss(), new_network(config), DECAYS, config.device)
    settings = {"group": "one_training", "preview": keep_weights, "checkpoint_every": 500}
    return train_digits(config, data, "right", loss, **settings), loss, folder


def along_training(config: ExperimentConfig) -> None:
    """Show that samples still improve after the loss has flattened."""
    config = with_default_steps(config)
    table = open_table(LESSON, config)
    data = load_splits(config.dataset, config.data_dir)
    reference, folder = reference_for(data[0]), train_once(config, data)[-1]
    metrics = read_metrics(folder / "right" / "metrics.csv")
    losses = {row["step"]: row.get("validation_loss") for row in metrics}
    curves: dict[str, list[tuple[float, float]]] = {"FID": [], "1000 L_simple, validation": []}

    def measure(file: Path) -> Row:
        network = load(str(file), config.device).network
        return sample_metrics(sample(network, config, SHOWN_STEPS, config.num_samples), reference)

    for file in sorted(folder.glob("snapshots/step_*.safetensors")):
        step = int(file.stem.removeprefix("step_"))
        row = table.row(partial(measure, file), step=step, loss=losses[step])
        curves["FID"].append((step, row["fid"]))
        curves["1000 L_simple, validation"].append((step, 1000 * row["loss"]))
    save_figure(table, plot_curves(curves, "step", "of the averaged weights"))


def ema(config: ExperimentConfig) -> None:
    """Measure what averaging the weights is worth, and what averaging for too long costs."""
    config = with_default_steps(config)
    table = open_table(LESSON, config)
    data = load_splits(config.dataset, config.data_dir)
    network, loss, _ = train_once(config, data)
    networks = {"0.995 with warm-up": network} | dict(zip(map(str, DECAYS), loss.averages))
    samplers = {name: partial(sample, net.eval(), config, SHOWN_STEPS) for name, net in networks.items()}
    compare(table, data[0], config, "decay", samplers)


def neighbours(config: ExperimentConfig) -> None:
    """Show that samples are as far from the training digits as unseen digits are, so they are no copies."""
    config = with_default_steps(config)
    table = open_table(LESSON, config, weights_of=LESSON)
    digits, unseen = load_splits(config.dataset, config.data_dir)
    network = load(device=config.device).network
    samples = sample(network, config, SHOWN_STEPS, config.num_samples).clamp(-1, 1)

    def nearest(images: Images) -> tuple[Float[Tensor, "n"], Int[Tensor, "n"]]:
        parts = [torch.cdist(x.flatten(1), digits.images.flatten(1)).min(1) for x in images.split(100)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def measure(images: Images) -> Row:
        quantiles = nearest(images)[0].quantile(torch.tensor([0.01, 0.5, 0.99])).tolist()
        return {"n": len(images)} | dict(zip(("1 %", "50 %", "99 %"), quantiles))

    table.row(partial(measure, samples), images="samples")
    table.row(partial(measure, unseen.images[: len(samples)]), images="unseen digits")
    closest = digits.images[nearest(samples[:16])[1]]
    save_image_rows(table, {"sample": samples[:16], "nearest in training": closest})


def mistakes(config: ExperimentConfig) -> None:
    """Compare each bug with the correct version, trained for as many steps."""
    config = with_default_steps(config, 1000)
    table = open_table(LESSON, config)
    data = load_splits(config.dataset, config.data_dir)
    averaging = AveragingLoss(make_loss(), new_network(config), (0.999,), config.device)
    losses = {
        "correct": averaging,
        "images in [0, 1]": make_loss(loss_unscaled),
        "t not given": make_loss(loss_without_t),
    }
    trained = {name: train_digits(config, data, name, loss) for name, loss in losses.items()}
    correct = trained["correct"]
    denoisers = {
        **trained,
        "t not given": without_t(trained["t not given"]),
        "t off by one": with_next_t(correct),
        "EMA without warm-up": averaging.averages[0].eval(),
    }
    samplers: dict[str, Callable[[int], Tensor]] = {
        name: partial(sample, net, config, SHOWN_STEPS) for name, net in denoisers.items()
    }
    unscaled = samplers["images in [0, 1]"]
    samplers["images in [0, 1]"] = lambda n: 2 * unscaled(n).clamp(0, 1) - 1  # compared in [-1, 1]
    samplers["noise in the last step"] = partial(
        sample, correct, config, SHOWN_STEPS, sampler=sample_with_final_noise
    )
    compare(table, data[0], config, "mistake", samplers)
    save_losses(table, {name: run_folder(LESSON, config, name) for name in losses})


EXPERIMENTS = by_name((variances, along_training, ema, neighbours, mistakes, metric_errors))

if __name__ == "__main__":
    run_command(partial(run_experiment, EXPERIMENTS), Config)
