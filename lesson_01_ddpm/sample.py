"""Lesson 1: draw digits from a trained DDPM.

python lesson_01_ddpm/sample.py --steps 1000 --out digits.png
"""

from dataclasses import dataclass
from pathlib import Path

from common.command import run_command
from common.runs import as_config
from common.sampling import SampleConfig, check_sampling, load_for_sampling, respaced, write_samples
from lesson_01_ddpm.diffusion import ddpm_sample
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE, new_diffusion
from lesson_01_ddpm.unet import UNet, UNetConfig

SAMPLERS = {"ddpm": ddpm_sample}


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 1: draw handwritten digits."""

    num_samples: int = 32
    steps: int = 250  # network evaluations a sample, at most 1000


def main(config):
    check_sampling(config, SAMPLERS)
    few = respaced(new_diffusion(), config.steps)
    network, _ = load_for_sampling(
        config,
        "lesson_01_ddpm",
        Path(__file__).parent,
        lambda facts: UNet(as_config(UNetConfig, facts["network"])),
    )
    sampler = SAMPLERS[config.sampler]
    prompts = [""] * config.num_samples
    write_samples(
        config, lambda i, x_T, generator: sampler(few, network, x_T, generator), IMAGE_SHAPE, prompts
    )


if __name__ == "__main__":
    run_command(main, Config)
