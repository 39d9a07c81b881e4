"""Lesson 5, measured: python lesson_05_cfg/experiments.py NAME

    guidance_curve    scales 0 to 20, clipped and with dynamic thresholding
    best_scale        the best of them alone; with --num-samples 5000 accuracies are known to 0.2 %
    interval          guidance at some noise levels only
    samplers          ancestral, DDIM and DPM-Solver++ at 5 to 250 steps, against seconds
    drop_probability  captions dropped in training never, rarely, often
    time_to_quality   how good after how many minutes, by Muon and AdamW, t drawn in two ways
    mistakes          the classic bugs, beside the right version

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

import time
from dataclasses import dataclass
from functools import partial

import torch

from common.captions import balanced_prompts
from common.command import run_command
from common.experiments import ExperimentConfig, quality, run_experiment
from common.pictures import curves
from common.runs import read_metrics
from common.sampling import load_network, sample_batches
from common.training import MuonConfig
from lesson_01_ddpm.diffusion import clip, uniform
from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_04_text_conditioning import captioned_mnist
from lesson_04_text_conditioning.captioned_mnist import IMAGE_SHAPE, PROMPTS, denoiser_of_prompts
from lesson_04_text_conditioning.experiments import Captioned
from lesson_04_text_conditioning.text_transformer import Text
from lesson_04_text_conditioning.velocity import loss_velocity
from lesson_05_cfg.dpm_solver import SAMPLERS, dpm_solver_sample
from lesson_05_cfg.guidance import drop_captions, dynamic_threshold, guided, guided_between, loss_of_captions
from lesson_05_cfg.timesteps import mostly_large

LESSON = "lesson_05_cfg"
SCALES = (0, 1, 1.5, 2, 3, 4, 7, 10, 20)
STEPS = (5, 10, 15, 20, 25, 50, 100, 250)
SHOWN_STEPS = 20  # of DPM-Solver++, where samples are compared
INTERVALS = ((0, 999), (0, 499), (500, 999), (250, 749), (0, 749), (250, 999))
RATES = {"muon": MuonConfig.learning_rate, "adamw": 1.5e-3}  # of learning
BUDGETS = (350, 700, 1400, 2800)  # steps of training
SCALE = 3  # of guidance, where nothing else is said
BEST = 2  # where FID is best


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


class Guided(Captioned):
    """An experiment that draws with `network`, which was trained to be guided."""

    lesson, network = LESSON, None

    def draw(self, prompts, denoiser_for, steps=SHOWN_STEPS, sampler=dpm_solver_sample, **settings):
        sampler = partial(sampler, new_diffusion().evenly(steps), **settings)
        denoiser_of = denoiser_of_prompts(self.network, self.tokenizer, prompts, denoiser_for)
        return sample_batches(sampler, denoiser_of, IMAGE_SHAPE, len(prompts), self.config)

    def measure(self, denoiser_for, steps=SHOWN_STEPS, n=None, **settings):
        """The numbers, the share of pixels that are saturated, and the seconds that a sample takes."""
        n = n or self.config.samples_at(steps)
        prompts, digits, colours = balanced_prompts(n)
        started = time.monotonic()
        samples = self.draw(prompts, denoiser_for, steps, **settings)
        seconds = (time.monotonic() - started) / n
        saturated = (samples.amax(1) >= 1).float().mean().item()
        return quality(samples, self.reference, digits, colours) | {
            "saturated": saturated,
            "seconds_a_sample": seconds,
        }


def shipped(config):
    """The experiment with the weights that this lesson ships."""
    experiment = Guided(config, weights_of=LESSON)
    experiment.network = load_network(None, LESSON, captioned_mnist.rebuild, config.device)[0]
    return experiment


def at_scale(scale):
    return partial(guided, guidance_scale=scale)


def guidance_curve(config):
    """Ho & Salimans 2022, table 1: accuracy against diversity. Saharia et al. 2022: thresholding helps."""
    experiment, lines = shipped(config), {}
    for bound in (clip, dynamic_threshold):
        for scale in SCALES:
            settings = {"scale": scale, "bound": bound.__name__}
            row = experiment.row(partial(experiment.measure, bound=bound), at_scale(scale), **settings)
            for name in ("fid", "diversity"):
                lines.setdefault(f"{name}, {bound.__name__}", []).append((scale + 0.1, row[name]))
    experiment.save(curves(lines, "s + 0.1", ""))


def best_scale(config):
    """The weights that are shipped, at the scale where their FID is best."""
    experiment = shipped(config)
    experiment.row(experiment.measure, at_scale(BEST), scale=BEST)
    experiment.save_rows({f"s = {BEST}": experiment.draw(PROMPTS, at_scale(BEST))})


def interval(config):
    """Kynkaanniemi et al. 2024: guidance is needed in the middle; at high noise it only costs diversity."""
    experiment, shown = shipped(config), {}
    for low, high in INTERVALS:
        denoiser_for = partial(guided_between, guidance_scale=SCALE, interval=(low, high))
        experiment.row(experiment.measure, denoiser_for, low=low, high=high)
        shown[f"t from {low} to {high}"] = experiment.draw(PROMPTS, denoiser_for)
    experiment.save_rows(shown)


def samplers(config):
    """Lu et al. 2022: DPM-Solver++ needs 15 to 20 steps, the others more."""
    experiment, lines = shipped(config), {}
    for name, sampler in SAMPLERS.items():
        for steps in STEPS:
            measure = partial(experiment.measure, sampler=sampler)
            row = experiment.row(measure, at_scale(SCALE), steps, sampler=name, steps=steps)
            if row["n"] == config.num_samples:
                lines.setdefault(name, []).append((row["seconds_a_sample"], row["fid"]))
    few = config.samples_at(max(STEPS))  # FID and KID compare at equal n: for so many there is one row more
    extra = partial(experiment.measure, sampler=dpm_solver_sample, n=few)
    experiment.row(extra, at_scale(SCALE), SHOWN_STEPS, sampler=f"dpm++, {few} samples", steps=SHOWN_STEPS)
    experiment.save(curves(lines, "seconds a sample", f"FID of {config.num_samples} samples"))


def loss_with(drop, draw_t=mostly_large):
    """This lesson's loss. drop: (mask) -> mask of the captions that are left."""
    return loss_of_captions(loss_velocity, new_diffusion(), drop, draw_t=draw_t)


def drop_probability(config):
    """Ho & Salimans 2022, section 4.2: 0.1 and 0.2 do equally well, 0.5 less.

    At 0 guidance starts from an answer that was never trained.
    """
    experiment, shown = Guided(config, steps=1000), {}
    for probability in (0.0, 0.1, 0.2, 0.5):
        loss = loss_with(partial(drop_captions, probability=probability))
        experiment.network = experiment.train(f"p {probability}", experiment.new_network(), loss)
        for scale in (1, SCALE):
            experiment.row(experiment.measure, at_scale(scale), dropped=probability, scale=scale)
        shown[f"{probability:.0%} dropped"] = experiment.draw(PROMPTS, at_scale(SCALE))
    experiment.save_rows(shown)


def time_to_quality(config):
    """Each training is of its own, for the learning rate decays towards its end: half a long one is less than
    a short one. `minutes_of_training` are of this machine, with nothing else to do."""
    experiment, lines = Guided(config), {}
    drop = partial(drop_captions, probability=0.1)
    shorter = BUDGETS[:-1]
    ways = ("muon", mostly_large, shorter), ("adamw", mostly_large, BUDGETS), ("adamw", uniform, shorter)
    for optimizer, draw_t, budgets in ways:
        settings = {"optimizer": optimizer, "learning_rate": RATES[optimizer]}
        way = {"optimizer": optimizer, "timesteps": draw_t.__name__.replace("_", " ")}
        for steps in (budget for budget in budgets if budget <= experiment.config.steps):
            name = f"{', '.join(way.values())}, {steps} steps"
            loss, network = loss_with(drop, draw_t), experiment.new_network()
            experiment.network = experiment.train(name, network, loss, steps=steps, **settings)
            minutes = read_metrics(experiment.folder_of(name) / "metrics.csv")[-1]["minutes"]
            key = way | {"training_steps": steps, "minutes_of_training": minutes}
            row = experiment.row(experiment.measure, at_scale(SCALE), **key)
            for measure, value in (("FID", row["fid"]), ("% wrong", 100 * (1 - row["both_accuracy"]))):
                lines.setdefault(f"{measure}, {', '.join(way.values())}", []).append((minutes, value))
    experiment.save(curves(lines, "minutes of training", ""))


def drop_whole_batches(mask):
    """The mistake: one draw for all."""
    return mask & (torch.rand(1, device=mask.device) >= 0.1)


def against_nothing(experiment, network, text, empty):
    """The mistake: the caption "nothing" where training had the empty one."""
    wrong = captioned_mnist.encode_prompts(network, experiment.tokenizer, ["nothing"])
    wrong = Text(*(part.expand_as(like) for part, like in zip(wrong, text)))
    return guided(network, text, wrong, SCALE)


def variance_guided_too(network, text, empty):
    """The mistake: all channels go into the formula, v too."""

    def denoiser(x_t, t):
        cond, uncond = network(x_t, t, text), network(x_t, t, empty)
        return uncond + SCALE * (cond - uncond)

    return denoiser


def mistakes(config):
    """Each bug beside the right version: one in training, the others in sampling from the shipped weights."""
    experiment = Guided(config, steps=1000, weights_of=LESSON)
    drops = {"right": partial(drop_captions, probability=0.1), "whole batches dropped": drop_whole_batches}
    losses = {name: loss_with(drop) for name, drop in drops.items()}
    networks = {n: experiment.train(n, experiment.new_network(), loss) for n, loss in losses.items()}
    networks["shipped"] = load_network(None, LESSON, captioned_mnist.rebuild, config.device)[0]
    ancestral = {"sampler": SAMPLERS["ddpm"]}
    versions = {
        "right, briefly trained": ("right", at_scale(SCALE), {}),
        "whole batches dropped": ("whole batches dropped", at_scale(SCALE), {}),
        "right, shipped weights": ("shipped", at_scale(SCALE), {}),
        '"nothing" for empty': ("shipped", partial(against_nothing, experiment), {}),
        "s = 3 taken for w": ("shipped", at_scale(SCALE + 1), {}),
        "w = 0 taken for s": ("shipped", at_scale(0), {}),
        "right, ancestral": ("shipped", at_scale(SCALE), ancestral),
        "variance guided, ancestral": ("shipped", variance_guided_too, ancestral),
    }
    shown = {}
    for name, (trained, denoiser_for, settings) in versions.items():
        experiment.network = networks[trained]
        experiment.row(partial(experiment.measure, **settings), denoiser_for, mistake=name)
        shown[name] = experiment.draw(PROMPTS, denoiser_for, **settings)
    experiment.save_rows(shown)
    experiment.save_losses(losses)


EXPERIMENTS = {
    f.__name__: f
    for f in (guidance_curve, best_scale, interval, samplers, drop_probability, time_to_quality, mistakes)
}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
