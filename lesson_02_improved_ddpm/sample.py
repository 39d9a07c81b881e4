"""Lesson 2: draw digits in few steps, ancestrally or by DDIM.

python lesson_02_improved_ddpm/sample.py --steps 50
"""

from dataclasses import dataclass

from common.command import run_command
from common.sampling import SampleConfig, load_for_sampling, write_samples
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.train_mnist import rebuild


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 2: draw handwritten digits."""

    num_samples: int = 32
    steps: int = 100  # network evaluations a sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config):
    sampler, network, _ = load_for_sampling(config, "lesson_02_improved_ddpm", SAMPLERS, rebuild)
    write_samples(config, sampler, lambda indices: network, IMAGE_SHAPE, [""] * config.num_samples)


if __name__ == "__main__":
    run_command(main, Config)
