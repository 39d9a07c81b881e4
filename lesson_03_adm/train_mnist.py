"""Lesson 3: the ADM UNet, conditioned on the digit to draw.

python lesson_03_adm/train_mnist.py
"""

from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.cli import SampleCount, run_command
from common.digits.evaluation import evaluate, format_metrics, reference_for
from common.digits.mnist import Digits, load_splits
from common.plotting import plot_grid
from common.sampling import sample_batches
from common.training.config import DigitsConfig
from common.training.run_dir import RunDir, saved_config
from common.training.train import train
from lesson_01_ddpm.diffusion import training_loss
from lesson_01_ddpm.model import SamplingSteps
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_03_adm.model import IMAGE_SHAPE, LESSON, build_model, class_denoiser


@dataclass(frozen=True)
class Config(DigitsConfig):
    """Lesson 3: train a diffusion model of handwritten digits that draws the digit you name."""

    sample_steps: SamplingSteps = 100  # ancestral steps per sample
    num_eval: SampleCount = 500  # samples that are measured

    default_minutes = 45.0  # for slow machines


def run(config: Config, data: tuple[Digits, Digits]) -> nn.Module:
    """Train on `data` (training and validation digits), measure, and return the averaged network."""
    digits, validation_digits = data
    run_dir = RunDir(LESSON, config, digits.name)
    reference = reference_for(digits)
    torch.manual_seed(config.seed)
    network, diffusion, metadata = build_model()

    def loss(network: nn.Module, x_0: Tensor, label: Tensor) -> Tensor:
        return training_loss(loss_hybrid, diffusion, partial(network, y=label), x_0)  # NEW: with the class

    def sample(network: nn.Module, classes: Tensor, steps: int) -> Tensor:
        sampler = partial(SAMPLERS["ddpm"], diffusion.respace_evenly(config.dry_run_cap(steps)))
        make_denoiser = class_denoiser(network, classes)
        return sample_batches(
            sampler, make_denoiser, IMAGE_SHAPE, len(classes), seed=config.seed, device=config.device
        )

    def preview(network: nn.Module) -> Figure:
        return plot_grid(sample(network, torch.arange(40) % 10, 50), columns=10)

    validation = validation_digits.batch(torch.arange(config.dry_run_cap(512)))
    network = train(
        network, loss, digits, config, run=run_dir, validation=validation, metadata=metadata, preview=preview
    )
    classes = torch.arange(config.dry_run_cap(config.num_eval)) % 10
    samples = sample(network, classes, config.sample_steps)
    metrics = evaluate(samples, reference, classes)
    print(format_metrics(metrics))
    run_dir.finish(metrics, "samples.png", plot_grid(samples[:80], columns=10))
    return network


def main(config: Config) -> None:
    run(config, load_splits(config.dataset, config.data_dir))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
