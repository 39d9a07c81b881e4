"""Lesson 2: sample digits in few steps, ancestrally or by DDIM.

python lesson_02_improved_ddpm/sample.py --steps 50
"""

from dataclasses import dataclass

from common.cli import PositiveInt, run_command
from common.sampling import SampleConfig, load_sampler, write_samples
from lesson_01_ddpm.model import SamplingSteps
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.model import IMAGE_SHAPE, load


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 2: sample handwritten digits."""

    num_samples: PositiveInt = 32  # digits
    steps: SamplingSteps = 100  # network evaluations per sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config: Config) -> None:
    sampler, model = load_sampler(config, SAMPLERS, load)
    write_samples(config, sampler, lambda indices: model.network, IMAGE_SHAPE, [""] * config.num_samples)


if __name__ == "__main__":
    run_command(main, Config)
