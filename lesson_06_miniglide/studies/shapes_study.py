"""The original's mistakes, each trained next to the correct version. Run by experiments.py."""

from functools import partial
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from common.protocols import Denoiser
from common.results.experiments import (
    ExperimentConfig,
    open_table,
    run_folder,
    save_image_rows,
    save_losses,
    with_default_steps,
)
from lesson_01_ddpm.diffusion import GaussianDiffusion, squared_error
from lesson_06_miniglide.networks.presets import LESSON, PRESETS
from lesson_06_miniglide.pipeline import MiniGlidePipeline
from lesson_06_miniglide.studies.captioned_shapes import (
    PROMPTS,
    SAMPLING_STEPS,
    fid_8x8,
    load_shapes,
    measure_captions,
    train_preset,
)

GUIDANCE_SCALES = (1, 3)
COLUMN_TITLES = {"variant": "variant", "guidance_scale": "s", "fid_8x8": ("FID of 8x8 pixels", ".2f")}


def loss_in_0_to_1(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n"]:
    """Return L_simple of images left in [0, 1]: a mistake, which our own losses refuse."""
    eps_hat = diffusion.predict(denoiser, diffusion.q_sample((x_0 + 1) / 2, t, noise), t)[:, : x_0.shape[1]]
    return squared_error(eps_hat, noise) / diffusion.alpha_bar[t.cpu()].float().to(x_0.device)


UNSCALED = "images in [0, 1]"
# Variant -> arguments of `train_preset`. Mistakes in the variational bound are measured by lesson 2.
ERRATA: dict[str, dict[str, Any]] = {
    "correct": {},
    "captions never dropped": {"caption_dropout": 0.0},
    "L_simple": {"loss": PRESETS["tiny"].losses[1]},
    UNSCALED: {"loss": loss_in_0_to_1},
}


def errata(config: ExperimentConfig) -> None:
    """Measure the original's mistakes, each trained for as many steps as the correct version."""
    config = with_default_steps(config)
    table, shapes = open_table(LESSON, config), load_shapes(config)

    def draw(variant: str, pipe: MiniGlidePipeline, captions: list[str], guidance_scale: float) -> Tensor:
        output = pipe(captions, guidance_scale, SAMPLING_STEPS, "ddpm", seed=config.seed, progress_bar=False)
        return 2 * output.tensor - 1 if variant == UNSCALED else output.tensor

    def measure(variant: str, pipe: MiniGlidePipeline, guidance_scale: float) -> dict[str, Any]:
        samples = draw(variant, pipe, shapes.captions, guidance_scale)
        return {"fid_8x8": fid_8x8(shapes.real, samples)} | measure_captions(samples, shapes.captions)

    figure_rows = {}
    for variant, changes in ERRATA.items():
        pipe = train_preset(config, shapes, variant, **changes)
        for scale in GUIDANCE_SCALES:
            table.row(partial(measure, variant, pipe, scale), variant=variant, guidance_scale=scale)
        figure_rows[variant] = draw(variant, pipe, PROMPTS * 2, 3)
    save_image_rows(table, figure_rows)
    save_losses(table, {variant: run_folder(LESSON, config, variant) for variant in ERRATA})
