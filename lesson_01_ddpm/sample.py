"""Lesson 1: draw digits from a trained DDPM.

python lesson_01_ddpm/sample.py --steps 1000 --out digits.png
"""

from dataclasses import dataclass

from common.command import run_command
from common.sampling import SampleConfig, load_for_sampling, write_samples
from lesson_01_ddpm.diffusion import ddpm_sample
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE, rebuild

SAMPLERS = {"ddpm": ddpm_sample}


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 1: draw handwritten digits."""

    num_samples: int = 32
    steps: int = 250  # network evaluations a sample, at most 1000


def main(config):
    sampler, network, _ = load_for_sampling(config, "lesson_01_ddpm", SAMPLERS, rebuild)
    write_samples(config, sampler, lambda indices: network, IMAGE_SHAPE, [""] * config.num_samples)


if __name__ == "__main__":
    run_command(main, Config)
