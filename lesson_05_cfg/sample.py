"""Lesson 5: draw what a caption says, and more so than the data do.

python lesson_05_cfg/sample.py --prompt "a red seven" --guidance-scale 3
"""

from dataclasses import dataclass
from functools import partial

from common.command import run_command
from lesson_04_text_conditioning.prompts import PromptConfig, sample_prompts
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import guided


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 5: draw coloured digits from captions, with classifier-free guidance."""

    guidance_scale: float = 3.0  # 0 ignores the caption, 1 is the plain model, more follows it harder
    steps: int = 20  # network evaluations a sample (two at once, with and without caption), at most 1000
    sampler: str = "dpm++"  # ddpm (ancestral, learned variance), ddim or dpm++ (DPM-Solver++(2M))


def main(config):
    denoiser_for = partial(guided, guidance_scale=config.guidance_scale)
    sample_prompts(config, "lesson_05_cfg", SAMPLERS, denoiser_for)


if __name__ == "__main__":
    run_command(main, Config)
