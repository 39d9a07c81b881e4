"""Lesson 2: lesson 1's digits with the cosine schedule, a learned variance and L_hybrid.

python lesson_02_improved_ddpm/train_mnist.py
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.cli import SampleCount, check_choice, run_command
from common.device import pick_device
from common.digits.evaluation import evaluate, format_metrics, reference_for
from common.digits.mnist import Digits, load_splits
from common.plotting import plot_grid
from common.protocols import Loss, LossAtT
from common.sampling import sample_batches
from common.training.config import DigitsConfig
from common.training.run_dir import RunDir, saved_config
from common.training.train import train
from lesson_01_ddpm.diffusion import GaussianDiffusion, loss_simple, training_loss
from lesson_01_ddpm.model import SamplingSteps
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.importance_sampling import ImportanceSampledLoss
from lesson_02_improved_ddpm.model import IMAGE_SHAPE, LESSON, SCHEDULES, UNET_CONFIG, build_model
from lesson_02_improved_ddpm.variational_bound import bits_per_dim, loss_hybrid, loss_vlb

LOSSES: dict[str, LossAtT] = {"simple": loss_simple, "hybrid": loss_hybrid, "vlb": loss_vlb}


@dataclass(frozen=True)
class Config(DigitsConfig):
    """Lesson 2: train a diffusion model of handwritten digits that learns its variance."""

    objective: str = "hybrid"  # simple (lesson 1's), hybrid, or vlb (L_vlb alone, t drawn by importance)
    schedule: str = "cosine"  # or linear (lesson 1's)
    sample_steps: SamplingSteps = 100  # ancestral steps per sample
    num_eval: SampleCount = 500  # samples that are measured

    immutable_on_resume = ("objective", "schedule")
    default_minutes = 45.0  # for slow machines


def make_loss(objective: str, diffusion: GaussianDiffusion) -> Loss:
    """Return the training loss (network, x_0, label) -> [N] of an objective; the label is ignored."""
    if objective == "vlb":
        return ImportanceSampledLoss(loss_vlb, diffusion)
    at_t = LOSSES[objective]
    return lambda network, x_0, label: training_loss(at_t, diffusion, network, x_0)


def run(config: Config, data: tuple[Digits, Digits]) -> nn.Module:
    """Train on `data` (training and validation digits), measure, and return the averaged network."""
    check_choice("--objective", config.objective, LOSSES)
    check_choice("--schedule", config.schedule, SCHEDULES)
    digits, validation_digits = data
    run_dir = RunDir(LESSON, config, digits.name)
    reference = reference_for(digits)
    torch.manual_seed(config.seed)
    unet_config = replace(UNET_CONFIG, out_channels=1) if config.objective == "simple" else UNET_CONFIG
    network, diffusion, metadata = build_model(unet_config, config.schedule)
    loss = make_loss(config.objective, diffusion)  # NEW: L_hybrid

    def sample(network: nn.Module, n: int, steps: int) -> Tensor:
        sampler = partial(SAMPLERS["ddpm"], diffusion.respace_evenly(config.dry_run_cap(steps)))
        n = config.dry_run_cap(n)
        return sample_batches(
            sampler, lambda indices: network, IMAGE_SHAPE, n, seed=config.seed, device=config.device
        )

    def preview(network: nn.Module) -> Figure:
        return plot_grid(sample(network, 32, 50))

    validation = validation_digits.batch(torch.arange(config.dry_run_cap(512)))
    network = train(
        network, loss, digits, config, run=run_dir, validation=validation, metadata=metadata, preview=preview
    )
    samples = sample(network, config.num_eval, config.sample_steps)
    unseen = validation_digits.images[: config.dry_run_cap(1000)].to(pick_device(config.device)).split(250)
    bits = bits_per_dim(diffusion, network, unseen, draws=4)  # NEW: measured in bits, too
    metrics = evaluate(samples, reference) | bits._asdict()
    print(format_metrics(metrics))
    run_dir.finish(metrics, "samples.png", plot_grid(samples[:64]))
    return network


def main(config: Config) -> None:
    run(config, load_splits(config.dataset, config.data_dir))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
