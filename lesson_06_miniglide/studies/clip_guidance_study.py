"""CLIP's gradient next to classifier-free guidance, on digits and on shapes. Run by experiments.py."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.digits.captions import balanced_prompts
from common.images import to_pixels
from common.metrics import fid_between
from common.plotting import plot_curves
from common.protocols import SamplerStep
from common.results.experiments import (
    ExperimentConfig,
    open_table,
    sample_metrics,
    save_figure,
    save_image_rows,
    with_default_steps,
)
from common.results.table import ResultsTable
from common.sampling import sample_batches
from lesson_01_ddpm.diffusion import ddpm_sample
from lesson_02_improved_ddpm.variational_bound import learned_range_or_fixed_small
from lesson_03_adm.classifier_guidance import condition_mean
from lesson_04_text_conditioning.captioned_mnist import PROMPTS as DIGIT_PROMPTS
from lesson_04_text_conditioning.studies.captioned_digits import open_study
from lesson_05_cfg.pipeline import LESSON as LESSON_5
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_06_miniglide.networks.noisy_clip import NoisyCLIP, clip_gradient, embed_captions
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.pipeline import MiniGlidePipeline
from lesson_06_miniglide.scoring.features import pixels_8x8
from lesson_06_miniglide.shapes.render import render_captions
from lesson_06_miniglide.studies.captioned_shapes import (
    PROMPTS,
    SAMPLING_STEPS,
    load_shapes,
    measure_captions,
)
from lesson_06_miniglide.studies.clip_study import train_digits_clip, train_shapes_clip

CLIP_SCALES = (0, 30, 100, 300, 1000)
CFG_SCALES = (1.5, 2, 3, 4)
COLUMN_TITLES = {"guidance": "guidance", "scale": "scale"}


def clip_guided_samples(
    pipe: TextToImagePipeline,
    clip: NoisyCLIP,
    prompts: Sequence[str],
    guidance_scale: float,
    clip_scale: float,
    seed: int,
) -> Float[Tensor, "n c h w"]:
    """Draw a sample per prompt by ancestral sampling with either kind of guidance.

    guidance_scale: of classifier-free guidance, 1 for none. clip_scale: of CLIP's gradient, 0 for none.
    """
    process = pipe.process.respace_evenly(SAMPLING_STEPS)
    make_denoiser = pipe.make_denoiser(prompts, guidance_scale)
    captions = embed_captions(clip, pipe.tokenizer, prompts)

    def denoiser_and_mean_fn(indices: Tensor) -> Any:
        gradient = clip_gradient(clip, captions[indices], clip_scale)
        return make_denoiser(indices), condition_mean(gradient) if clip_scale else None

    def sampler(both: Any, x_T: Tensor, generator: torch.Generator) -> Iterator[SamplerStep]:
        denoiser, mean_fn = both
        return ddpm_sample(
            process, denoiser, x_T, generator, log_variance_fn=learned_range_or_fixed_small, mean_fn=mean_fn
        )

    device = str(pipe.device)
    return sample_batches(
        sampler, denoiser_and_mean_fn, pipe.image_shape, len(prompts), seed=seed, device=device
    )


def compare_guidance(
    table: ResultsTable,
    sample: Callable[[Sequence[str], float, float], Tensor],
    prompts: Sequence[str],
    measure: Callable[[Tensor], Mapping[str, Any]],
    figure_prompts: Sequence[str],
) -> None:
    """Measure a row for each scale of both kinds of guidance; plot FID against diversity, and samples.

    sample: (prompts, guidance_scale, clip_scale) -> samples. measure: samples of `prompts` -> metrics with
    "fid" and "diversity".
    """

    def draw_and_measure(*scales: float) -> Mapping[str, Any]:
        return measure(sample(prompts, *scales))

    settings: dict[tuple[str, float], tuple[float, float]] = {("CLIP", s): (1, s) for s in CLIP_SCALES}
    settings |= {("classifier-free", s): (s, 0) for s in CFG_SCALES}
    curves: dict[str, list[tuple[float, float]]] = {}
    figure_rows = {}
    for (guidance, scale), scales in settings.items():
        row = table.row(partial(draw_and_measure, *scales), guidance=guidance, scale=scale)
        no_guidance = curves["CLIP"][:1] if curves else []  # both curves start there
        diversity = row["diversity"] if row["diversity"] is not None else math.nan  # for very few samples
        curves.setdefault(guidance, no_guidance).append((diversity, row["fid"]))
        figure_rows[f"{guidance}, {scale:g}"] = sample(figure_prompts, *scales)
    save_figure(table, plot_curves(curves, "diversity", "FID"))
    size = next(iter(figure_rows.values())).shape[-1]
    save_image_rows(table, figure_rows, "_samples", scale=70 / size, column_labels=figure_prompts)


def clip_guidance(config: ExperimentConfig) -> None:
    """Compare CLIP's gradient with classifier-free guidance on digits (Nichol et al. 2022, section 5)."""
    config = with_default_steps(config)
    study = open_study(LESSON, config, weights_of=LESSON_5)
    pipe = TextToImagePipeline.from_pretrained(None, config.device)
    sample = partial(clip_guided_samples, pipe, train_digits_clip(study, "clip"), seed=config.seed)
    prompts, digits, colours = balanced_prompts(config.num_samples)
    measure = partial(sample_metrics, reference=study.reference, digits=digits, colours=colours)
    compare_guidance(study.table, sample, prompts, measure, DIGIT_PROMPTS)


def clip_guidance_of_shapes(config: ExperimentConfig) -> None:
    """Compare the two on shapes, with this lesson's pretrained network.

    Each caption is drawn twice. Diversity is the mean distance between the two samples, divided by that
    between two real images of the caption.
    """
    config = with_default_steps(config)
    table, shapes = open_table(LESSON, config, weights_of=LESSON), load_shapes(config)
    pipe = MiniGlidePipeline.from_pretrained(None, config.device)
    clip = train_shapes_clip(config, shapes, pipe.process)
    captions = shapes.captions[: (config.num_samples + 1) // 2]
    real = pixels_8x8(render_captions(captions * 2, config.seed + 2))

    def spread(features: Tensor) -> float:
        return (features[: len(captions)] - features[len(captions) :]).norm(dim=1).mean().item()

    def measure(samples: Tensor) -> dict[str, Any]:
        features = pixels_8x8(to_pixels(samples))
        row = {"diversity": spread(features) / spread(real), "fid": fid_between(real, features)}
        return row | measure_captions(samples, captions * 2)

    sample = partial(clip_guided_samples, pipe, clip, seed=config.seed)
    compare_guidance(table, sample, captions * 2, measure, PROMPTS)
