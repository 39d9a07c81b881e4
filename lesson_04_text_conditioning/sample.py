"""Lesson 4: sample from captions.

python lesson_04_text_conditioning/sample.py --prompt "a red seven"
"""

from dataclasses import dataclass
from functools import partial

from common.cli import run_command
from common.conditioning import select
from common.sampling import load_sampler, write_samples
from lesson_01_ddpm.model import SamplingSteps
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_04_text_conditioning.model import IMAGE_SHAPE, encode_prompts, load, tokenizer_from_metadata
from lesson_04_text_conditioning.prompts import PromptConfig, grid_layout, warn_truncated


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 4: sample coloured digits from captions."""

    steps: SamplingSteps = 100  # network evaluations per sample, at most 1000
    sampler: str = "ddpm"  # ddpm (ancestral, learned variance) or ddim


def main(config: Config) -> None:
    sampler, (network, _, metadata) = load_sampler(config, SAMPLERS, load)
    prompts, tokenizer = config.prompts(["a red seven"]), tokenizer_from_metadata(metadata)
    warn_truncated(tokenizer, prompts)
    text = encode_prompts(network, tokenizer, prompts)

    def make_denoiser(indices):
        return partial(network, text=select(text, indices))

    write_samples(config, sampler, make_denoiser, IMAGE_SHAPE, prompts, **grid_layout(prompts))


if __name__ == "__main__":
    run_command(main, Config)
