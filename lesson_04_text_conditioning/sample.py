"""Lesson 4: draw what a caption says.

python lesson_04_text_conditioning/sample.py --prompt "a red seven"
"""

from dataclasses import dataclass

from common.command import run_command
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_04_text_conditioning.captioned_mnist import conditional
from lesson_04_text_conditioning.prompts import PromptConfig, sample_prompts


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 4: draw coloured digits from captions."""

    steps: int = 100  # network evaluations a sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config):
    sample_prompts(config, "lesson_04_text_conditioning", SAMPLERS, conditional)


if __name__ == "__main__":
    run_command(main, Config)
