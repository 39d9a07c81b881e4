"""Lesson 3, measured: python lesson_03_adm/experiments.py NAME

    ablation             ADM's changes to the UNet, alone and together, at equal steps and at equal time
    classifier_guidance  lesson 2's network, guided by a classifier of noisy digits, or of clean ones
    mistakes             the classic bugs, each trained beside the right version

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

from dataclasses import dataclass, replace
from functools import cache, partial
from statistics import median

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from common.command import pick_device, run_command
from common.evaluation import reference_for
from common.experiments import Experiment, ExperimentConfig, quality, run_experiment
from common.flops import flop_counter
from common.pictures import curves
from common.sampling import load_network, sample_batches
from common.training import MuonConfig, Trainer
from common.turns import take_turns
from lesson_01_ddpm.diffusion import loss_at_random_t
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE
from lesson_02_improved_ddpm import train_mnist as lesson_2
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_03_adm.adm_unet import ClassUNet
from lesson_03_adm.classifier_guidance import classifier_gradient, guide_mean
from lesson_03_adm.noisy_classifier import NoisyClassifier, loss_classifier
from lesson_03_adm.train_mnist import NETWORK, denoiser_of_classes

LESSON = "lesson_03_adm"
SHOWN_STEPS = 25  # of ancestral sampling, which needs fewer than DDIM on digits (lesson 2)
SCALES = (0, 0.5, 1, 2, 3, 5, 10)  # of classifier guidance
TIMED = 25  # training steps timed of each network
# What ADM changed, from lesson 2's UNet (with classes) on; lesson 3 leaves out the attention at 16
PLAIN = replace(
    NETWORK, attention_resolutions=(8,), num_head_channels=None, scale_shift_norm=False, resblock_updown=False
)
CHANGES = {
    "AdaGN": {"scale_shift_norm": True},
    "attention at 16, 8, 4": {"attention_resolutions": (16, 8, 4)},
    "heads of 32": {"num_head_channels": 32},
    "BigGAN up and down": {"resblock_updown": True},
}


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def balanced(n):
    return torch.arange(n) % 10


def draw(network, n, config):
    sampler = partial(SAMPLERS["ddpm"], lesson_2.new_diffusion().evenly(SHOWN_STEPS))
    return sample_batches(sampler, denoiser_of_classes(network, balanced(n)), IMAGE_SHAPE, n, config)


def loss_of_classes(network, x_0, label):
    return loss_at_random_t(loss_hybrid, lesson_2.new_diffusion(), partial(network, y=label), x_0)


def new_network(settings, config):
    torch.manual_seed(config.seed)
    return ClassUNet(settings)


def with_classes(samples, reference):
    return quality(samples, reference, balanced(len(samples)))


def variants():
    """name -> network settings: plain, with each change alone, with all."""
    alone = {f"+ {name}": replace(PLAIN, **change) for name, change in CHANGES.items()}
    together = {key: value for change in CHANGES.values() for key, value in change.items()}
    return {"DDPM UNet": PLAIN} | alone | {"all": replace(PLAIN, **together)}


def seconds_a_step(digits, config):
    """name -> seconds of a training step (median) of each variant; they take turns."""
    train_config, steps = MuonConfig(device=config.device), {}
    for name, settings in variants().items():
        parts = new_network(settings, config), loss_of_classes, digits, train_config
        steps[name] = partial(Trainer(*parts, None, None, {}, None).train_step, 0.0)
    timed = take_turns(steps, TIMED, pick_device(config.device))
    return {name: median(seconds) for name, seconds in timed.items()}


def cost(name, seconds, config):
    """Parameters, FLOPs of an evaluation of one image, and seconds of a training step."""
    network, label = new_network(variants()[name], config), torch.zeros(1, dtype=torch.int64)
    with flop_counter() as counter, torch.no_grad():
        network(torch.zeros(1, *IMAGE_SHAPE), label, label)
    return {
        "parameters": sum(p.numel() for p in network.parameters()),
        "megaflops": round(counter.get_total_flops() / 1e6, 1),
        "seconds_a_step": seconds()[name],
    }


def ablation(config):
    """Dhariwal & Nichol 2021, tables 1 to 3: which change to the UNet is worth what."""
    experiment = Experiment(LESSON, config, steps=1200)
    reference, shown = reference_for(experiment.digits), {}

    def measure(network):
        return with_classes(draw(network, config.num_samples, config), reference)

    seconds = cache(partial(seconds_a_step, experiment.digits, config))
    costs = {name: experiment.row(cost, name, seconds, config, cost=name) for name in variants()}
    steps = experiment.config.steps
    cheapest = min(row["seconds_a_step"] for row in costs.values())
    for name, settings in variants().items():
        fewer = max(1, round(steps * cheapest / costs[name]["seconds_a_step"]))
        for at, n in {"equal time": fewer, "equal steps": steps}.items():
            network, variant = new_network(settings, config), f"{name}, {n} steps"
            network = experiment.train(variant, network, loss_of_classes, kind=MuonConfig, steps=n)
            experiment.row(measure, network, network=name, at=at, steps=n)
        shown[name] = draw(network, 20, config)
    experiment.save_rows(shown)


def loss_clean(classifier, x_0, label):
    """The mistake: a classifier that has never seen noise (and is told t = 0)."""
    return cross_entropy(classifier(x_0, torch.zeros_like(label)), label, reduction="none")


def at_zero(classifier, x_t, t):
    """Whoever has learned at t = 0 alone is asked there."""
    return classifier(x_t, torch.zeros_like(t))


def classifier_guidance(config):
    """Dhariwal & Nichol 2021, figure 4: with the scale, precision rises and diversity falls.

    The classifier must have learned on x_t: of one that knows clean digits only, the gradient leads nowhere.
    """
    network, diffusion, _ = load_network(None, "lesson_02_improved_ddpm", lesson_2.rebuild, config.device)
    experiment = Experiment(LESSON, config, steps=1000, weights_of="lesson_02_improved_ddpm")
    reference, lines = reference_for(experiment.digits), {}
    few = diffusion.evenly(SHOWN_STEPS)

    def guided_samples(classifier, scale, n):
        labels = balanced(n)

        def sampler(indices, x_T, generator):  # in the place of the denoiser come the samples' numbers
            y = labels[indices].to(x_T.device)
            guide = guide_mean(classifier_gradient(classifier, y, scale))
            return SAMPLERS["ddpm"](few, network, x_T, generator, guide=guide)

        return sample_batches(sampler, lambda indices: indices, IMAGE_SHAPE, n, config)

    def measure(classifier, scale):
        return with_classes(guided_samples(classifier, scale, config.num_samples), reference)

    losses = {"noisy": partial(loss_classifier, diffusion), "clean": loss_clean}
    for name, loss in losses.items():
        torch.manual_seed(config.seed)
        classifier = experiment.train(name, NoisyClassifier(), loss)
        asked = classifier if name == "noisy" else partial(at_zero, classifier)
        for scale in SCALES:
            row = experiment.row(measure, asked, scale, classifier=name, scale=scale)
            lines.setdefault(f"FID, {name}", []).append((scale + 0.1, row["fid"]))
            lines.setdefault(f"digit right, {name}", []).append((scale + 0.1, row["digit_accuracy"]))
    experiment.save(curves(lines, "scale + 0.1", ""))


def without_zeros(network):
    """The mistake: the layers that should start at zero start like all others."""
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return network


def mistakes(config):
    """Each bug beside the right version: samples, and the losses on the way."""
    experiment = Experiment(LESSON, config, steps=1000)
    reference = reference_for(experiment.digits)
    networks = {
        "right": new_network(NETWORK, config),
        "no zeros at the start": without_zeros(new_network(NETWORK, config)),
        "16 groups": new_network(replace(NETWORK, groups=16), config),
    }

    def measure(network):
        return with_classes(draw(network, config.num_samples, config), reference)

    trained = {
        name: experiment.train(name, network, loss_of_classes, kind=MuonConfig)
        for name, network in networks.items()
    }
    for name, network in trained.items():
        experiment.row(measure, network, mistake=name)
    experiment.save_rows({name: draw(network, 20, config) for name, network in trained.items()})
    experiment.save_losses(trained)


EXPERIMENTS = {f.__name__: f for f in (ablation, classifier_guidance, mistakes)}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
