"""Lesson 3: sample the digits you name.

python lesson_03_adm/sample.py --digit 7
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from common.cli import Bounds, PositiveInt, run_command
from common.sampling import SampleConfig, load_sampler, write_samples
from lesson_01_ddpm.model import SamplingSteps
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_03_adm.model import IMAGE_SHAPE, class_denoiser, load


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 3: sample handwritten digits of the class you name."""

    num_samples: PositiveInt = 40  # digits
    digit: Annotated[int, Bounds(0, 9, "be a digit, 0 to 9")] | None = None  # 0 to 9; default: all in turn
    steps: SamplingSteps = 100  # network evaluations per sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config: Config) -> None:
    sampler, model = load_sampler(config, SAMPLERS, load)
    n = config.num_samples
    classes = torch.arange(n) % 10 if config.digit is None else torch.full((n,), config.digit)
    names = [str(digit) for digit in classes.tolist()]
    write_samples(config, sampler, class_denoiser(model.network, classes), IMAGE_SHAPE, names, columns=10)


if __name__ == "__main__":
    run_command(main, Config)
