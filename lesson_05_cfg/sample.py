"""Lesson 5: sample from captions with classifier-free guidance.

python lesson_05_cfg/sample.py --prompt "a red seven" --guidance-scale 3
"""

from dataclasses import dataclass

from common.cli import GuidanceScale, run_command
from lesson_01_ddpm.model import SamplingSteps
from lesson_04_text_conditioning.prompts import PromptConfig
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_05_cfg.sample_prompts import check_sampling_flags, sample_prompts


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 5: sample coloured digits from captions, with classifier-free guidance."""

    # 0 ignores the caption, 1 is the plain model, more follows it more closely
    guidance_scale: GuidanceScale = 3.0
    # network evaluations per sample (with and without caption at once), at most 1000
    steps: SamplingSteps = 20
    sampler: str = "dpm++"  # ddpm (ancestral, learned variance), ddim or dpm++ (DPM-Solver++(2M))


def main(config: Config) -> None:
    check_sampling_flags(config)
    sample_prompts(config, TextToImagePipeline.from_pretrained(config.checkpoint, config.device))


if __name__ == "__main__":
    run_command(main, Config)
