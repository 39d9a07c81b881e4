"""What lesson 5's experiments share: guided samples and their metrics, and the loss with caption dropout."""

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from jaxtyping import Float
from torch import Tensor

from common.digits.captions import balanced_prompts
from common.plotting import plot_curves
from common.protocols import Loss, Sampler, TextToImageNetwork
from common.results.experiments import ExperimentConfig, sample_metrics, save_figure, with_default_steps
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.studies.captioned_digits import (
    PromptDenoiser,
    Study,
    open_study,
    sample_prompts,
)
from lesson_04_text_conditioning.velocity import loss_hybrid_velocity
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample
from lesson_05_cfg.guidance import caption_loss, prompt_denoiser
from lesson_05_cfg.pipeline import LESSON, TextToImagePipeline
from lesson_05_cfg.timesteps import sample_noisy_timesteps

SHOWN_STEPS = 20  # of DPM-Solver++, for samples that are compared


def sample(
    study: Study,
    network: TextToImageNetwork,
    prompts: Sequence[str],
    denoiser_for: PromptDenoiser,
    steps: int = SHOWN_STEPS,
    sampler: Sampler = dpmpp_2m_sample,
) -> Float[Tensor, "n c h w"]:
    """Draw one sample per prompt."""
    return sample_prompts(network, study.tokenizer, prompts, denoiser_for, sampler, steps, study.config)


def measure(
    study: Study,
    network: TextToImageNetwork,
    denoiser_for: PromptDenoiser,
    steps: int = SHOWN_STEPS,
    sampler: Sampler = dpmpp_2m_sample,
    n: int | None = None,
) -> dict[str, Any]:
    """Return metrics of samples, the fraction of saturated pixels, and the seconds per sample."""
    prompts, digits, colours = balanced_prompts(n or study.config.samples_at(steps))
    started = time.monotonic()
    samples = sample(study, network, prompts, denoiser_for, steps, sampler)
    seconds = (time.monotonic() - started) / len(prompts)
    return sample_metrics(samples, study.reference, digits, colours) | {
        "saturated": (samples.amax(1) >= 1).float().mean().item(),
        "seconds_a_sample": seconds,
    }


def at_scale(scale: float) -> PromptDenoiser:
    """Return (network, tokenizer, prompts) -> denoiser with this guidance scale."""
    return partial(prompt_denoiser, guidance_scale=scale)


def pretrained_network(config: ExperimentConfig) -> TextToImageNetwork:
    """Return this lesson's pretrained network on the experiment's device. Raises UserError."""
    return TextToImagePipeline.from_pretrained(device=config.device).network


def open_pretrained(config: ExperimentConfig) -> tuple[Study, TextToImageNetwork]:
    """Return the study of the pretrained network, and the network. Raises UserError."""
    return open_study(LESSON, with_default_steps(config), weights_of=LESSON), pretrained_network(config)


def compare_samplers(
    config: ExperimentConfig,
    column: str,
    samplers: Mapping[str, Sampler],
    scale: float,
    step_counts: Sequence[int],
    metric: str,
) -> None:
    """Measure samplers, whose names stand in `column`, at several numbers of steps; plot one metric."""
    study, network = open_pretrained(config)
    curves = defaultdict(list)
    for name, sampler in samplers.items():
        for steps in step_counts:
            measure_steps = partial(measure, study, network, at_scale(scale), steps, sampler)
            row = study.table.row(measure_steps, **{column: name}, steps=steps)
            curves[name].append((steps, row[metric]))
    label = "network evaluations (with and without caption)"
    save_figure(study.table, plot_curves(curves, label, metric.upper()))


def loss_with(
    drop_fn: Callable[[Tensor], Tensor], sample_t: Callable[[int, int], Tensor] = sample_noisy_timesteps
) -> Loss:
    """Return this lesson's loss. drop_fn: mask -> mask, for caption dropout."""
    return caption_loss(loss_hybrid_velocity, make_diffusion(), drop_fn, sample_t=sample_t)
