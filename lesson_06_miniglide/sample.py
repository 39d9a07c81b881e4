"""Lesson 6: draw what a caption says, at 64x64.

python lesson_06_miniglide/sample.py --checkpoint runs/lesson_06_miniglide/... --prompt "golden retriever"
"""

from dataclasses import dataclass
from functools import partial

from common.command import run_command
from lesson_04_text_conditioning.prompts import PromptConfig, sample_prompts
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import guided
from lesson_06_miniglide.generate import LESSON
from lesson_06_miniglide.presets import IMAGE_SHAPE, rebuild


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 6: draw 64x64 images from captions, with classifier-free guidance."""

    guidance_scale: float = 3.0  # 0 ignores the caption, 1 is the plain model, more follows it harder
    steps: int = 20  # network evaluations a sample (two at once, with and without caption)
    sampler: str = "dpm++"  # ddpm (ancestral), ddim or dpm++ (DPM-Solver++(2M))


def main(config):
    denoiser_for = partial(guided, guidance_scale=config.guidance_scale)
    sample_prompts(config, LESSON, SAMPLERS, denoiser_for, rebuild, IMAGE_SHAPE)


if __name__ == "__main__":
    run_command(main, Config)
