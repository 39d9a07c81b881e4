"""Measure lesson 3: python lesson_03_adm/experiments.py NAME

NAME is one of
    ablation             ADM's changes to the UNet, alone and together, for equal steps and equal time
    classifier_guidance  lesson 2's network, guided by a classifier of noisy digits or of clean ones
    mistakes             the classic bugs, each trained next to the correct version

Each writes results/NAME.json and NAME.png. An interrupted experiment continues with the missing rows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.cli import run_command
from common.device import pick_device
from common.digits.classifier import load_digit_classifier
from common.digits.evaluation import Reference, diversity, reference_for
from common.digits.mnist import Digits, load_splits
from common.plotting import plot_curves
from common.protocols import Denoiser, Loss, SamplerStep
from common.results.experiments import (
    ExperimentConfig,
    by_name,
    open_table,
    run_experiment,
    run_folder,
    sample_metrics,
    save_figure,
    save_image_rows,
    save_losses,
    train_variant,
    with_default_steps,
)
from common.results.flops import flop_counter
from common.results.table import Row
from common.results.timing import time_interleaved
from common.sampling import BoundSampler, MakeDenoiser, sample_batches
from common.training.config import DigitsConfig
from common.training.trainer import Trainer
from lesson_01_ddpm.diffusion import ddpm_sample, training_loss
from lesson_02_improved_ddpm import model as lesson_2
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.variational_bound import learned_range, loss_hybrid
from lesson_03_adm.adm_unet import ADMConfig
from lesson_03_adm.classifier_guidance import classifier_gradient, condition_mean
from lesson_03_adm.mistakes import at_zero, loss_clean, without_zero_init
from lesson_03_adm.model import (
    IMAGE_SHAPE,
    LESSON,
    UNET_CONFIG,
    build_model,
    class_denoiser,
    make_diffusion,
    variants,
)
from lesson_03_adm.noisy_classifier import NoisyClassifier, exact_classifier, loss_classifier

SHOWN_STEPS = 25  # of ancestral sampling, which needs fewer than DDIM on digits (lesson 2)
SCALES = (0, 0.5, 1, 2, 3, 5, 10, 20, 40)  # of classifier guidance
TIMED = 25  # training steps that are timed per network
NUM_VALIDATION = 512  # images of the validation loss
NUM_EXACT = 5_000  # images of the exact classifier
COLUMN_TITLES = {
    "cost": "network",
    "seconds_a_step": ("seconds per step", ".3f"),
    "at": "compared at",
    "steps": "training steps",
    "scale": "scale",
    "diversity_correct": ("diversity of the correct samples", ".2f"),
}
Images = Float[Tensor, "n 1 32 32"]


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def balanced_classes(n: int) -> Int[Tensor, "{n}"]:
    """Return the classes 0 to 9 in turn."""
    return torch.arange(n) % 10


def draw(sampler: BoundSampler, make_denoiser: MakeDenoiser, n: int, config: ExperimentConfig) -> Images:
    """Draw n digits with the experiment's seed and device."""
    return sample_batches(sampler, make_denoiser, IMAGE_SHAPE, n, seed=config.seed, device=config.device)


def sample(network: nn.Module, n: int, config: ExperimentConfig) -> Images:
    """Draw n digits of balanced classes from a class-conditional network."""
    sampler = partial(SAMPLERS["ddpm"], make_diffusion().respace_evenly(SHOWN_STEPS))
    make_denoiser = class_denoiser(network, balanced_classes(n))
    return draw(sampler, make_denoiser, n, config)


def class_metrics(samples: Images, reference: Reference) -> Row:
    """Return the metrics of samples of balanced classes."""
    return sample_metrics(samples, reference, balanced_classes(len(samples)))


def loss_of_classes(network: nn.Module, x_0: Tensor, label: Tensor) -> Float[Tensor, "n"]:
    """Return L_hybrid of a class-conditional network at random t, for each sample."""
    return training_loss(loss_hybrid, make_diffusion(), partial(network, y=label), x_0)


def new_network(unet_config: ADMConfig, config: ExperimentConfig) -> nn.Module:
    """Return an untrained class-conditional network, the same for the same seed."""
    torch.manual_seed(config.seed)
    return build_model(unet_config).network


def train_classes(
    config: ExperimentConfig, data: tuple[Digits, Digits], variant: str, network: nn.Module, **settings: Any
) -> nn.Module:
    """Train a class-conditional network and return its average. settings: of its `DigitsConfig`."""
    settings["config_class"] = DigitsConfig
    validation = data[1].batch(torch.arange(NUM_VALIDATION))
    return train_variant(LESSON, config, variant, network, loss_of_classes, data[0], validation, **settings)


def seconds_per_step(digits: Digits, config: ExperimentConfig) -> dict[str, float]:
    """Return the median time of a training step of each variant, measured interleaved."""
    train_config = DigitsConfig(device=config.device)
    steps = {}
    for name, unet_config in variants().items():
        trainer = Trainer(new_network(unet_config, config), loss_of_classes, digits, train_config)
        steps[name] = partial(trainer.train_step, 0.0)
    timed = time_interleaved(steps, TIMED, pick_device(config.device))
    return {name: median(seconds) for name, seconds in timed.items()}


def cost(name: str, seconds: Callable[[], dict[str, float]], config: ExperimentConfig) -> Row:
    """Return a variant's parameters, FLOPs per evaluation of one image, and seconds per training step."""
    network, label = new_network(variants()[name], config), torch.zeros(1, dtype=torch.int64)
    with flop_counter() as counter, torch.no_grad():
        network(torch.zeros(1, *IMAGE_SHAPE), label, label)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "megaflops": round(counter.get_total_flops() / 1e6, 1),
        "seconds_a_step": seconds()[name],
    }


def ablation(config: ExperimentConfig) -> None:
    """Measure what each change to the UNet is worth (Dhariwal & Nichol 2021, tables 1 to 3)."""
    config = with_default_steps(config, 1200)
    assert config.steps is not None  # with_default_steps has set it
    table = open_table(LESSON, config)
    data = load_splits(config.dataset, config.data_dir)
    reference, shown = reference_for(data[0]), {}

    def measure(network: nn.Module) -> Row:
        return class_metrics(sample(network, config.num_samples, config), reference)

    seconds = cache(partial(seconds_per_step, data[0], config))
    costs = {name: table.row(partial(cost, name, seconds, config), cost=name) for name in variants()}
    cheapest = min(row["seconds_a_step"] for row in costs.values())
    for name, unet_config in variants().items():
        fewer = max(1, round(config.steps * cheapest / costs[name]["seconds_a_step"]))
        for at, steps in {"equal time": fewer, "equal steps": config.steps}.items():
            network = new_network(unet_config, config)
            network = train_classes(config, data, f"{name}, {steps} steps", network, steps=steps)
            table.row(partial(measure, network), network=name, at=at, steps=steps)
        shown[name] = sample(network, 20, config)
    save_image_rows(table, shown)


def classifier_guidance(config: ExperimentConfig) -> None:
    """Sweep the scale: precision rises and diversity falls (Dhariwal & Nichol 2021, figure 4)."""
    config = with_default_steps(config, 1000)
    table = open_table(LESSON, config, weights_of=lesson_2.LESSON)
    digits, validation_digits = load_splits(config.dataset, config.data_dir)
    validation = validation_digits.batch(torch.arange(NUM_VALIDATION))
    network, diffusion, _ = lesson_2.load(device=config.device)
    few, reference = diffusion.respace_evenly(SHOWN_STEPS), reference_for(digits)
    curves: dict[str, list[tuple[float, float]]] = {}

    def measure(name: str, scale: float) -> Row:
        """Return the metrics of all samples, and the diversity of those that show the requested digit."""
        classifier = guide(name)

        def sampler(denoiser: Denoiser, x_T: Tensor, generator: torch.Generator) -> Iterator[SamplerStep]:
            y = balanced_classes(len(x_T)).to(x_T.device)  # every batch of 250 starts with class 0
            mean_fn = condition_mean(classifier_gradient(classifier, y, scale))
            return ddpm_sample(few, denoiser, x_T, generator, learned_range, mean_fn=mean_fn)

        samples = draw(sampler, lambda indices: network, config.num_samples, config)
        features, probabilities = load_digit_classifier().predict(samples.cpu())
        classes = balanced_classes(len(samples))
        correct = probabilities.argmax(1) == classes
        of_correct = diversity(features[correct], classes[correct], reference)  # NaN if there are too few
        metrics = class_metrics(samples, reference)
        return metrics | {"diversity_correct": of_correct if of_correct == of_correct else None}

    losses: dict[str, Loss] = {"noisy": partial(loss_classifier, diffusion), "clean": loss_clean}

    @cache  # a classifier is trained when a row needs it
    def guide(name: str) -> Denoiser:
        if name == "exact":
            images, labels = digits.batch(torch.arange(min(NUM_EXACT, len(digits))))
            return exact_classifier(diffusion, images.to(pick_device(config.device)), labels)
        torch.manual_seed(config.seed)
        classifier = train_variant(LESSON, config, name, NoisyClassifier(), losses[name], digits, validation)
        return classifier if name == "noisy" else at_zero(classifier)

    for name, scales in {"noisy": SCALES, "clean": SCALES[:-2], "exact": (1, 3)}.items():
        for scale in scales:
            row = table.row(partial(measure, name, scale), classifier=name, scale=scale)
            for title, key in {"FID": "fid", "digit correct": "digit_accuracy"}.items():
                curves.setdefault(f"{title}, {name}", []).append((scale + 0.1, row[key]))
    save_figure(table, plot_curves(curves, "scale + 0.1", ""))


def mistakes(config: ExperimentConfig) -> None:
    """Compare each bug with the correct version, trained for as many steps."""
    config = with_default_steps(config, 1000)
    table = open_table(LESSON, config)
    data = load_splits(config.dataset, config.data_dir)
    reference = reference_for(data[0])
    networks = {
        "correct": new_network(UNET_CONFIG, config),
        "no zeros at the start": without_zero_init(new_network(UNET_CONFIG, config)),
        "16 groups": new_network(replace(UNET_CONFIG, num_groups=16), config),
    }
    trained = {name: train_classes(config, data, name, network) for name, network in networks.items()}

    def measure(network: nn.Module) -> Row:
        return class_metrics(sample(network, config.num_samples, config), reference)

    for name, network in trained.items():
        table.row(partial(measure, network), mistake=name)
    save_image_rows(table, {name: sample(network, 20, config) for name, network in trained.items()})
    save_losses(table, {name: run_folder(LESSON, config, name) for name in networks})


EXPERIMENTS = by_name((ablation, classifier_guidance, mistakes))

if __name__ == "__main__":
    run_command(partial(run_experiment, EXPERIMENTS), Config)
