"""Lesson 6, measured: python lesson_06_miniglide/experiments.py NAME

    errata         the original's mistakes that can be trained, each beside the right version, on drawn shapes
    upsampling     16 to 64 pixels, trained with and without noise: on real pictures, and on samples
    inpainting     a network trained to fill holes, and one that was not, on the same holes
    retrieval      how much noise a CLIP can read through, on captioned digits; _of_shapes: on drawn shapes
    clip_guidance  its gradient beside classifier-free guidance, on digits; _of_shapes

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

from dataclasses import dataclass

from common.command import run_command
from common.experiments import ExperimentConfig, run_experiment
from lesson_06_miniglide import clip_experiments as of_clip
from lesson_06_miniglide.editing_experiments import inpainting, upsampling
from lesson_06_miniglide.shapes_experiments import errata


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


OF_CLIP = (of_clip.retrieval, of_clip.clip_guidance)
OF_CLIP += (of_clip.retrieval_of_shapes, of_clip.clip_guidance_of_shapes)
EXPERIMENTS = {f.__name__: f for f in (errata, upsampling, inpainting, *OF_CLIP)}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
