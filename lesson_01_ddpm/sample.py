"""Lesson 1: sample digits from a trained DDPM.

python lesson_01_ddpm/sample.py --steps 1000 --out digits.png
"""

from dataclasses import dataclass

from common.cli import PositiveInt, run_command
from common.sampling import SampleConfig, load_sampler, write_samples
from lesson_01_ddpm.diffusion import ddpm_sample
from lesson_01_ddpm.model import IMAGE_SHAPE, SamplingSteps, load


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 1: sample handwritten digits."""

    num_samples: PositiveInt = 32  # digits
    steps: SamplingSteps = 250  # network evaluations per sample, at most 1000


def main(config: Config) -> None:
    sampler, model = load_sampler(config, {"ddpm": ddpm_sample}, load)
    write_samples(config, sampler, lambda indices: model.network, IMAGE_SHAPE, [""] * config.num_samples)


if __name__ == "__main__":
    run_command(main, Config)
