"""Lesson 6: draw what a caption says, at 64x64.

python lesson_06_miniglide/sample.py --checkpoint runs/lesson_06_miniglide/... --prompt "golden retriever"
"""

from dataclasses import dataclass, replace
from functools import partial

from common.command import UserError, run_command
from lesson_04_text_conditioning.prompts import PromptConfig, sample_prompts
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import guided
from lesson_06_miniglide import published_glide
from lesson_06_miniglide.generate import LESSON
from lesson_06_miniglide.presets import IMAGE_SHAPE, rebuild


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 6: draw 64x64 images from captions, with classifier-free guidance."""

    # 0 ignores the caption, 1 is the plain model, more follows it harder; default 3 (to repaint: 5)
    guidance_scale: float | None = None
    # network evaluations a sample (two at once, with and without caption); default 20, of --openai 100
    steps: int | None = None
    # ddpm (ancestral), ddim or dpm++ (DPM-Solver++(2M)); default dpm++, of --openai ddpm
    sampler: str | None = None

    openai: str | None = None  # the published GLIDE instead: base.pt, or base_inpaint.pt to repaint
    openai_upsampler: str | None = None  # 64 to 256 pixels: upsample.pt, or upsample_inpaint.pt
    vocabulary: str | None = None  # of the published GLIDE: a folder of GPT-2's encoder.json and vocab.bpe
    image: str | None = None  # a picture to repaint
    mask: str | None = None  # and one that is white where to draw anew, black where to keep it


def main(config):
    if config.openai:
        return published_glide.sample(config)
    for flag in ("openai_upsampler", "vocabulary", "image", "mask"):
        if getattr(config, flag):
            raise UserError(f"--{flag.replace('_', '-')} needs --openai, a published base model")
    scale = 3.0 if config.guidance_scale is None else config.guidance_scale
    config = replace(config, steps=config.steps or 20, sampler=config.sampler or "dpm++")
    denoiser_for = partial(guided, guidance_scale=scale)
    sample_prompts(config, LESSON, SAMPLERS, denoiser_for, rebuild, IMAGE_SHAPE)


if __name__ == "__main__":
    run_command(main, Config)
