"""Lesson 6, measured: python lesson_06_miniglide/experiments.py NAME

    guidance_scales  the pretrained network of shapes at several guidance scales
    design           what the shifted noise schedule and the patches of 2x2 pixels are worth, on shapes
    errata           the original's mistakes that can be trained, each next to the correct version, on shapes
    upsampling       16 to 64 pixels, trained with and without noise conditioning, on real images and samples
    inpainting       a network trained to inpaint, and RePaint, on the same masked regions
    noise_levels     the pretrained upsampler at several levels, and how certain the differences are
    retrieval        how much noise CLIP can read through, on captioned digits; retrieval_of_shapes: on shapes
    clip_guidance    CLIP's gradient next to classifier-free guidance, on digits; clip_guidance_of_shapes
    flow_matching    flow matching next to diffusion, on digits, at 5 to 20 network evaluations

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

from dataclasses import dataclass

from common.cli import run_command
from common.results.experiments import ExperimentConfig, by_name, run_experiment
from lesson_06_miniglide.studies import (
    clip_guidance_study,
    clip_study,
    editing_study,
    flow_study,
    paired_study,
    shapes_study,
)


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


EXPERIMENTS = by_name(
    (
        shapes_study.guidance_scales,
        shapes_study.design,
        shapes_study.errata,
        editing_study.upsampling,
        editing_study.inpainting,
        paired_study.noise_levels,
        clip_study.retrieval,
        clip_study.retrieval_of_shapes,
        clip_guidance_study.clip_guidance,
        clip_guidance_study.clip_guidance_of_shapes,
        flow_study.flow_matching,
    )
)

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
