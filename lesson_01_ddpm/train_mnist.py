"""Lesson 1: train a DDPM on MNIST, sample from it, and measure the samples.

python lesson_01_ddpm/train_mnist.py
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
from lesson_01_ddpm.diffusion import ddpm_sample, loss_simple, training_loss
from lesson_01_ddpm.model import IMAGE_SHAPE, LESSON, SamplingSteps, build_model


@dataclass(frozen=True)
class Config(DigitsConfig):
    """Lesson 1: train a diffusion model of handwritten digits."""

    sample_steps: SamplingSteps = 1000  # ancestral steps per sample of the final grid
    eval_steps: SamplingSteps = 100  # ancestral steps per sample that is measured
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
        return training_loss(loss_simple, diffusion, network, x_0)

    def sample(network: nn.Module, n: int, steps: int) -> Tensor:
        sampler = partial(ddpm_sample, diffusion.respace_evenly(config.dry_run_cap(steps)))
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
    metrics = evaluate(sample(network, config.num_eval, config.eval_steps), reference)
    print(format_metrics(metrics))
    run_dir.finish(metrics, "samples.png", plot_grid(sample(network, 64, config.sample_steps)))
    return network


def main(config: Config) -> None:
    run(config, load_splits(config.dataset, config.data_dir))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
