"""The pretrained network's guidance scales and design, and the original's mistakes. Run by experiments.py."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.images import to_pixels
from common.plotting import plot_curves
from common.protocols import Denoiser
from common.results.experiments import (
    ExperimentConfig,
    open_table,
    run_folder,
    save_figure,
    save_image_rows,
    save_losses,
    with_default_steps,
)
from common.results.table import ResultsTable
from lesson_01_ddpm.diffusion import GaussianDiffusion, squared_error
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_06_miniglide.image_data.captioned_images import make_shapes
from lesson_06_miniglide.networks.presets import LESSON, PRESETS
from lesson_06_miniglide.pipeline import MiniGlidePipeline
from lesson_06_miniglide.scoring.shape_metrics import caption_metrics
from lesson_06_miniglide.shapes.checker import detect_shapes, shows_relation, shows_specs
from lesson_06_miniglide.shapes.scenes import RELATIONS, parse
from lesson_06_miniglide.studies.captioned_shapes import (
    PROMPTS,
    SAMPLING_STEPS,
    fid_8x8,
    load_shapes,
    measure_captions,
    train_preset,
)

GUIDANCE_SCALES = (1, 3)
COLUMN_TITLES = {
    "variant": "variant",
    "guidance_scale": "s",
    "fid_8x8": ("FID of 8x8 pixels", ".2f"),
    "relation_correct": "in the relation",
    "relation_opposite": "in the opposite one",
    "relation_other_axis": "on the other axis",
}


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


def compare_variants(
    config: ExperimentConfig, table: ResultsTable, variants: Mapping[str, dict[str, Any]]
) -> None:
    """Train variants of `tiny`, measure each at two guidance scales, and write a figure of their samples.

    variants: name -> arguments of `train_preset`; steps among them become a column.
    """
    shapes, figure_rows = load_shapes(config), {}

    def draw(variant: str, pipe: MiniGlidePipeline, captions: list[str], guidance_scale: float) -> Tensor:
        output = pipe(captions, guidance_scale, SAMPLING_STEPS, "ddpm", seed=config.seed, progress_bar=False)
        return 2 * output.tensor - 1 if variant == UNSCALED else output.tensor

    def measure(variant: str, pipe: MiniGlidePipeline, guidance_scale: float) -> dict[str, Any]:
        samples = draw(variant, pipe, shapes.captions, guidance_scale)
        return {"fid_8x8": fid_8x8(shapes.real, samples)} | measure_captions(samples, shapes.captions)

    for variant, arguments in variants.items():
        pipe = train_preset(config, shapes, variant, **arguments)
        keys = {"variant": variant} | ({"training_steps": arguments["steps"]} if "steps" in arguments else {})
        for scale in GUIDANCE_SCALES:
            table.row(partial(measure, variant, pipe, scale), **keys, guidance_scale=scale)
        figure_rows[variant] = draw(variant, pipe, PROMPTS * 2, 3)
    save_image_rows(table, figure_rows)


def errata(config: ExperimentConfig) -> None:
    """Measure the original's mistakes, each trained for as many steps as the correct version."""
    config = with_default_steps(config)
    table = open_table(LESSON, config)
    compare_variants(config, table, ERRATA)
    save_losses(table, {variant: run_folder(LESSON, config, variant) for variant in ERRATA})


# Without patches, the network has a level more, at 64x64. Its steps take 3.2 times as long (one core with
# AMX: 29 images per second instead of 95), so that it has as many fewer.
NO_PATCHES = replace(PRESETS["tiny"].network, patch_size=1, channel_mult=(1, 1, 1, 4 / 3))
NO_PATCHES_TIME = 3.2
# Variant -> (time of a step, changes of the preset `tiny`).
DESIGNS: dict[str, tuple[float, dict[str, Any]]] = {
    "tiny": (1, {}),
    "cosine schedule, not shifted": (1, {"betas": cosine_betas}),
    "no patches, as much time": (NO_PATCHES_TIME, {"network": NO_PATCHES}),
}


def design(config: ExperimentConfig) -> None:
    """Measure what the shifted noise schedule and the patches of `tiny` are worth at equal time."""
    config = with_default_steps(config, 1000)
    assert config.steps is not None
    variants = {
        name: {"steps": round(config.steps / step_time)} | changes
        for name, (step_time, changes) in DESIGNS.items()
    }
    compare_variants(config, open_table(LESSON, config), variants)


CFG_SCALES = (1, 2, 3)  # guidance scales
CHUNK = 100  # samples per call; chunk i has the seed 100 i, as in evaluate.py


def relation_counts(samples: Tensor, captions: list[str]) -> dict[str, int]:
    """Return how the shapes of samples stand, of those whose two shapes are right.

    relation_correct: as the caption says. relation_opposite: in the opposite relation, such as "right of" for
    "left of". relation_other_axis: one above the other instead of side by side, or the reverse.
    """
    counts = {"relation_correct": 0, "relation_opposite": 0, "relation_other_axis": 0}
    for pixels, scene in zip(to_pixels(samples), map(parse, captions)):
        shapes = detect_shapes(pixels) if scene.relation else None
        if scene.relation is None or shapes is None or not shows_specs(shapes, scene):
            continue
        x, y = RELATIONS[scene.relation]
        opposite = next(name for name, direction in RELATIONS.items() if direction == (-x, -y))
        if shows_relation(shapes, scene):
            counts["relation_correct"] += 1
        elif shows_relation(shapes, scene._replace(relation=opposite)):
            counts["relation_opposite"] += 1
        else:
            counts["relation_other_axis"] += 1
    return counts


def guidance_scales(config: ExperimentConfig) -> None:
    """Measure the pretrained network at several guidance scales, with evaluate.py's captions and sampler."""
    table = open_table(LESSON, config, weights_of=LESSON)
    pipe = MiniGlidePipeline.from_pretrained(None, config.device)
    data = make_shapes(config.num_samples, seed=config.seed + 1)
    captions = data.captions_for(torch.arange(len(data)))

    def measure(guidance_scale: float) -> dict[str, Any]:
        chunks = [captions[start : start + CHUNK] for start in range(0, len(captions), CHUNK)]
        seeds = [config.seed * 1_000_003 + CHUNK * i for i in range(len(chunks))]
        samples = torch.cat(
            [pipe(c, guidance_scale, seed=seed, progress_bar=False).tensor for c, seed in zip(chunks, seeds)]
        )
        metrics = caption_metrics(to_pixels(samples), captions)
        kinds = np.array([parse(caption).kind for caption in captions])
        sizes = {f"n_{kind}": int((kinds == kind).sum()) for kind in np.unique(kinds)}
        return {"n": len(captions), **sizes, **metrics, **relation_counts(samples, captions)}

    rows = [table.row(partial(measure, scale), guidance_scale=scale) for scale in CFG_SCALES]
    names = ("caption", "single", "count", "pair")
    curves = {name: [(row["guidance_scale"], row[f"{name}_accuracy"] or 0) for row in rows] for name in names}
    save_figure(table, plot_curves(curves, "guidance scale", "correct", logarithmic=False))
