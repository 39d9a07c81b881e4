"""Lesson 2: draw digits in few steps, ancestrally or by DDIM.

python lesson_02_improved_ddpm/sample.py --sampler ddim --steps 25
"""

from dataclasses import dataclass
from pathlib import Path

from common.command import run_command
from common.runs import as_config
from common.sampling import SampleConfig, check_sampling, load_for_sampling, respaced, write_samples
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE
from lesson_01_ddpm.unet import UNet, UNetConfig
from lesson_02_improved_ddpm.sampling import SAMPLERS
from lesson_02_improved_ddpm.train_mnist import new_diffusion


@dataclass(frozen=True)
class Config(SampleConfig):
    """Lesson 2: draw handwritten digits."""

    num_samples: int = 32
    steps: int = 100  # network evaluations a sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config):
    check_sampling(config, SAMPLERS)
    few = respaced(new_diffusion(), config.steps)
    network, _ = load_for_sampling(
        config,
        "lesson_02_improved_ddpm",
        Path(__file__).parent,
        lambda facts: UNet(as_config(UNetConfig, facts["network"])),
    )
    sampler = SAMPLERS[config.sampler]
    prompts = [""] * config.num_samples
    write_samples(
        config, lambda _, x_T, generator: sampler(few, network, x_T, generator), IMAGE_SHAPE, prompts
    )


if __name__ == "__main__":
    run_command(main, Config)
