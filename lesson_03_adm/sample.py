"""Lesson 3: draw the digits you ask for.

python lesson_03_adm/sample.py --digit 7
"""

from dataclasses import dataclass

import torch

from common.command import UserError, run_command
from common.sampling import SampleConfig, load_for_sampling, write_samples
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_03_adm.train_mnist import denoiser_of_classes, rebuild


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 3: draw handwritten digits of the class asked for."""

    num_samples: int = 40
    digit: int | None = None  # 0 to 9; default: all in turn
    steps: int = 100  # network evaluations a sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config):
    if config.digit is not None and config.digit not in range(10):
        raise UserError(f"--digit {config.digit} is no digit; choose 0 to 9")
    sampler, network, _ = load_for_sampling(config, "lesson_03_adm", SAMPLERS, rebuild)
    n = config.num_samples
    classes = torch.arange(n) % 10 if config.digit is None else torch.full((n,), config.digit)
    denoiser_of = denoiser_of_classes(network, classes)
    names = [str(digit) for digit in classes.tolist()]
    write_samples(config, sampler, denoiser_of, IMAGE_SHAPE, names, columns=10)


if __name__ == "__main__":
    run_command(main, Config)
