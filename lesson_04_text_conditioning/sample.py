"""Lesson 4: draw what a caption says.

python lesson_04_text_conditioning/sample.py --prompt "a red seven"
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from common.command import run_command
from common.sampling import check_sampling, load_for_sampling, respaced
from lesson_02_improved_ddpm.sampling import SAMPLERS
from lesson_04_text_conditioning.captioned_mnist import new_diffusion, rebuild
from lesson_04_text_conditioning.prompts import PromptConfig, write_prompt_samples


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 4: draw coloured digits from captions."""

    steps: int = 100  # network evaluations a sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config):
    check_sampling(config, SAMPLERS)
    prompts, few = config.prompts(), respaced(new_diffusion(), config.steps)
    network, facts = load_for_sampling(config, "lesson_04_text_conditioning", Path(__file__).parent, rebuild)

    def start(text, empty, x_T, generator):
        return SAMPLERS[config.sampler](few, partial(network, text=text), x_T, generator)

    write_prompt_samples(config, prompts, network, facts, start)


if __name__ == "__main__":
    run_command(main, Config)
