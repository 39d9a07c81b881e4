"""Measure lesson 5: python lesson_05_cfg/experiments.py NAME

NAME is one of
    guidance_curve    guidance scales 0 to 20, with clipping and with dynamic thresholding
    lesson_4          guidance with lesson 4's network, which was trained without caption dropout
    best_scale        the scale of the best FID alone; --num-samples 5000 gives accuracies within 0.2 %
    interval          guidance at some noise levels only
    samplers          ancestral sampling, DDIM and DPM-Solver++ at 5 to 50 steps
    last_step         DPM-Solver++ with and without extrapolation in its last step
    drop_probability  training without caption dropout, with little and with much
    time_to_quality   quality after several training times, by Muon and AdamW, with t drawn in two ways
    mistakes          the classic bugs, next to the right version

Each writes results/NAME.json and NAME.png. An interrupted experiment continues with the missing rows.
"""

from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from typing import Any

from common.cli import run_command
from common.plotting import plot_curves
from common.protocols import Sampler
from common.results.experiments import (
    ExperimentConfig,
    by_name,
    run_experiment,
    run_folder,
    save_figure,
    save_image_rows,
    save_losses,
    with_default_steps,
)
from common.training.config import DigitsConfig
from common.training.metrics_csv import read_metrics
from lesson_01_ddpm.diffusion import clamp_x_0, uniform_timesteps
from lesson_04_text_conditioning.captioned_mnist import PROMPTS
from lesson_04_text_conditioning.model import LESSON as LESSON_4
from lesson_04_text_conditioning.model import load as load_lesson_4
from lesson_04_text_conditioning.studies.captioned_digits import (
    PromptDenoiser,
    Study,
    open_study,
    train_captioned,
    untrained_network,
)
from lesson_05_cfg.dpm_solver import SAMPLERS, dpmpp_2m_sample
from lesson_05_cfg.guidance import drop_captions, dynamic_threshold, prompt_denoiser
from lesson_05_cfg.mistakes import against_nothing, drop_whole_batches, variance_guided_too
from lesson_05_cfg.pipeline import LESSON
from lesson_05_cfg.studies.guided_digits import (
    at_scale,
    compare_samplers,
    loss_with,
    measure,
    open_pretrained,
    pretrained_network,
    sample,
)
from lesson_05_cfg.timesteps import sample_noisy_timesteps

SCALES = (0, 1, 1.5, 2, 3, 4, 7, 10, 20)
STEPS = (5, 10, 15, 20, 50)
INTERVALS = ((0, 999), (0, 499), (500, 999), (250, 749), (0, 749), (250, 999))
LEARNING_RATES = {"muon": DigitsConfig.learning_rate, "adamw": 1.5e-3}
BUDGETS = (350, 700, 1400, 2800)  # training steps
SCALE = 3  # guidance scale, unless an experiment says otherwise
BEST_SCALE = 2  # guidance scale with the best FID
COLUMN_TITLES = {
    "scale": "s",
    "denoised_fn": "range",
    "saturated": ("saturated pixels", ".1%"),
    "low": "guided from t",
    "high": "to",
    "steps": "sampling steps",
    "last_step": "last step",
    "dropped": ("captions dropped", ".0%"),
    "timesteps": "t",
    "seconds_a_sample": ("seconds per sample", ".2f"),
}
# Names of functions in tables and figures
DENOISED_FNS = {"clip": clamp_x_0, "dynamic_threshold": dynamic_threshold}
SAMPLE_T = {"mostly large": sample_noisy_timesteps, "uniform": uniform_timesteps}


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


# -- experiments with the pretrained weights -----------------------------------------------------------------


def guidance_curve(config: Config) -> None:
    """Measure accuracy and diversity by guidance scale (Ho & Salimans 2022, table 1).

    Predicted images are clipped, or rescaled by dynamic thresholding (Saharia et al. 2022, section 2.3).
    """
    study, network = open_pretrained(config)
    curves = defaultdict(list)
    for name, denoised_fn in DENOISED_FNS.items():
        sampler = partial(dpmpp_2m_sample, denoised_fn=denoised_fn)
        for scale in SCALES:
            measure_scale = partial(measure, study, network, at_scale(scale), sampler=sampler)
            row = study.table.row(measure_scale, scale=scale, denoised_fn=name)
            for metric in ("fid", "diversity"):
                curves[f"{metric}, {name}"].append((scale + 0.1, row[metric]))
    save_figure(study.table, plot_curves(curves, "s + 0.1", ""))


def lesson_4(config: Config) -> None:
    """Measure guidance with lesson 4's network, whose training had no empty captions."""
    study = open_study(LESSON, with_default_steps(config), weights_of=LESSON_4)
    network, shown = load_lesson_4(device=config.device).network, {}
    for scale in (1, 2, 3):
        study.table.row(partial(measure, study, network, at_scale(scale)), scale=scale)
        shown[f"s = {scale}"] = sample(study, network, PROMPTS, at_scale(scale))
    save_image_rows(study.table, shown)


def best_scale(config: Config) -> None:
    """Measure the pretrained weights at the guidance scale with the best FID."""
    study, network = open_pretrained(config)
    study.table.row(partial(measure, study, network, at_scale(BEST_SCALE)), scale=BEST_SCALE)
    save_image_rows(study.table, {f"s = {BEST_SCALE}": sample(study, network, PROMPTS, at_scale(BEST_SCALE))})


def interval(config: Config) -> None:
    """Measure guidance at some timesteps only (Kynkäänniemi et al. 2024)."""
    study, network = open_pretrained(config)
    shown = {}
    for low, high in INTERVALS:
        denoiser_for = partial(prompt_denoiser, guidance_scale=SCALE, interval=(low, high))
        study.table.row(partial(measure, study, network, denoiser_for), low=low, high=high)
        shown[f"t from {low} to {high}"] = sample(study, network, PROMPTS, denoiser_for)
    save_image_rows(study.table, shown)


def samplers(config: Config) -> None:
    """Compare samplers at few and many steps (Lu et al. 2022)."""
    compare_samplers(config, "sampler", SAMPLERS, SCALE, STEPS, "kid")


def last_step(config: Config) -> None:
    """Measure DPM-Solver++ with and without extrapolation in its last step to a noise level."""
    extrapolating = partial(dpmpp_2m_sample, lower_order_final=False)
    orders: dict[str, Sampler] = {"first order": dpmpp_2m_sample, "second order": extrapolating}
    compare_samplers(config, "last_step", orders, BEST_SCALE, STEPS[:4], "fid")


# -- experiments with training -------------------------------------------------------------------------------


def drop_probability(config: Config) -> None:
    """Compare fractions of dropped captions (Ho & Salimans 2022, section 4.2).

    Without dropout, guidance starts from a prediction that was never trained.
    """
    study, shown = open_study(LESSON, with_default_steps(config, 1000)), {}
    for probability in (0.0, 0.1, 0.2, 0.5):
        loss = loss_with(partial(drop_captions, probability=probability))
        network = train_captioned(study, f"p {probability}", untrained_network(study), loss)
        for scale in (1, SCALE):
            measure_scale = partial(measure, study, network, at_scale(scale))
            study.table.row(measure_scale, dropped=probability, scale=scale)
        shown[f"{probability:.0%} dropped"] = sample(study, network, PROMPTS, at_scale(SCALE))
    save_image_rows(study.table, shown)


def train_briefly(study: Study, optimizer: str, timesteps: str, steps: int) -> dict[str, Any]:
    """Train for `steps` and return the metrics of guided samples and the minutes of training."""
    variant = f"{optimizer}, {timesteps}, {steps} steps"
    loss = loss_with(partial(drop_captions, probability=0.1), SAMPLE_T[timesteps])
    network = train_captioned(
        study,
        variant,
        untrained_network(study),
        loss,
        steps=steps,
        optimizer=optimizer,
        learning_rate=LEARNING_RATES[optimizer],
    )
    last = read_metrics(run_folder(LESSON, study.config, variant) / "metrics.csv")[-1]
    return {"minutes_of_training": last["minutes"]} | measure(study, network, at_scale(SCALE))


def time_to_quality(config: Config) -> None:
    """Measure the model after several training times, by two optimizers and two distributions of t.

    Every row is a training run of its own, because the learning rate decays towards the end of a run.
    """
    config = with_default_steps(config)
    study, curves = open_study(LESSON, config), defaultdict(list)
    for optimizer, timesteps, budgets in (
        ("muon", "mostly large", BUDGETS[:-1]),
        ("adamw", "mostly large", BUDGETS),
        ("adamw", "uniform", BUDGETS[:-1]),
    ):
        for steps in (budget for budget in budgets if budget <= (config.steps or 0)):
            train = partial(train_briefly, study, optimizer, timesteps, steps)
            row = study.table.row(train, optimizer=optimizer, timesteps=timesteps, training_steps=steps)
            minutes, wrong = row["minutes_of_training"], 100 * (1 - row["both_accuracy"])
            curves[f"FID, {optimizer}, {timesteps}"].append((minutes, row["fid"]))
            curves[f"% wrong, {optimizer}, {timesteps}"].append((minutes, wrong))
    save_figure(study.table, plot_curves(curves, "minutes of training", ""))


def mistakes(config: Config) -> None:
    """Compare each bug with the right version: one bug of training, and several of sampling."""
    study = open_study(LESSON, with_default_steps(config, 1000), weights_of=LESSON)
    pretrained = pretrained_network(config)
    losses = {
        "right": loss_with(partial(drop_captions, probability=0.1)),
        "whole batches dropped": loss_with(drop_whole_batches),
    }
    trained = {
        name: train_captioned(study, name, untrained_network(study), loss) for name, loss in losses.items()
    }
    right = at_scale(SCALE)
    wrong_empty = partial(against_nothing, guidance_scale=SCALE)
    wrong_variance = partial(variance_guided_too, guidance_scale=SCALE)
    versions: dict[str, tuple[Any, PromptDenoiser, str]] = {  # the str: name of the sampler
        "right, briefly trained": (trained["right"], right, "dpm++"),
        "whole batches dropped": (trained["whole batches dropped"], right, "dpm++"),
        "right, shipped weights": (pretrained, right, "dpm++"),
        '"nothing" for empty': (pretrained, wrong_empty, "dpm++"),
        "s = 3 taken for w": (pretrained, at_scale(SCALE + 1), "dpm++"),
        "w = 0 taken for s": (pretrained, at_scale(0), "dpm++"),
        "right, ancestral": (pretrained, right, "ddpm"),
        "variance guided, ancestral": (pretrained, wrong_variance, "ddpm"),
    }
    shown = {}
    for name, (network, denoiser_for, sampler) in versions.items():
        measure_version = partial(measure, study, network, denoiser_for, sampler=SAMPLERS[sampler])
        study.table.row(measure_version, mistake=name)
        shown[name] = sample(study, network, PROMPTS, denoiser_for, sampler=SAMPLERS[sampler])
    save_image_rows(study.table, shown)
    save_losses(study.table, {name: run_folder(LESSON, study.config, name) for name in losses})


WITH_PRETRAINED = (guidance_curve, lesson_4, best_scale, interval, samplers, last_step)
EXPERIMENTS = by_name((*WITH_PRETRAINED, drop_probability, time_to_quality, mistakes))

if __name__ == "__main__":
    run_command(partial(run_experiment, EXPERIMENTS), Config)
