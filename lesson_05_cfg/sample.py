"""Lesson 5: draw what a caption says, and more so than the data do.

python lesson_05_cfg/sample.py --prompt "a red seven" --guidance-scale 3
"""

from dataclasses import dataclass
from pathlib import Path

from common.command import run_command
from common.sampling import check_sampling, load_for_sampling, respaced
from lesson_02_improved_ddpm.sampling import SAMPLERS
from lesson_04_text_conditioning.captioned_mnist import new_diffusion, rebuild
from lesson_04_text_conditioning.prompts import PromptConfig, write_prompt_samples
from lesson_05_cfg.dpm_solver import dpm_solver_sample
from lesson_05_cfg.guidance import guided

SAMPLERS = {**SAMPLERS, "dpm++": dpm_solver_sample}


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 5: draw coloured digits from captions, with classifier-free guidance."""

    guidance_scale: float = (
        3.0  # 0 ignores the caption, 1 is the plain model, more follows the caption harder
    )
    steps: int = 20  # network evaluations a sample (two at once, with and without caption), at most 1000
    sampler: str = "dpm++"  # ddpm (ancestral, learned variance), ddim or dpm++ (DPM-Solver++(2M))


def main(config):
    check_sampling(config, SAMPLERS)
    prompts, few = config.prompts(), respaced(new_diffusion(), config.steps)
    network, facts = load_for_sampling(config, "lesson_05_cfg", Path(__file__).parent, rebuild)

    def start(text, empty, x_T, generator):
        denoiser = guided(network, text, empty, config.guidance_scale)
        return SAMPLERS[config.sampler](few, denoiser, x_T, generator)

    write_prompt_samples(config, prompts, network, facts, start)


if __name__ == "__main__":
    run_command(main, Config)
