"""Lesson 2, measured: python lesson_02_improved_ddpm/experiments.py NAME

    objectives      linear and cosine schedule with L_simple, L_hybrid and L_vlb: bits per dimension and FID
    few_steps       fixed variances, learned variance and DDIM at 5 to 250 steps
    lesson_1_bits   bits per dimension of lesson 1's network with either fixed variance
    gradient_noise  the gradient of L_vlb with t drawn uniformly and by importance
    mistakes        the classic bugs, each trained beside the right version

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch

from common.command import run_command
from common.evaluation import reference_for
from common.experiments import Experiment, ExperimentConfig, quality, run_experiment
from common.pictures import bars, curves
from common.sampling import load_network, sample_batches
from lesson_01_ddpm import diffusion as ddpm
from lesson_01_ddpm import train_mnist as lesson_1
from lesson_01_ddpm.unet import UNet
from lesson_02_improved_ddpm.ddim import SAMPLERS, ddim_sample
from lesson_02_improved_ddpm.importance_sampling import ImportanceSampled
from lesson_02_improved_ddpm.train_mnist import LOSSES, NETWORK, SCHEDULES, new_diffusion, new_loss, rebuild
from lesson_02_improved_ddpm.variational_bound import (
    bits_per_dim,
    learned_range,
    loss_hybrid,
    loss_vlb,
    vb_terms_bits,
)

LESSON = "lesson_02_improved_ddpm"
SHOWN_STEPS = 100  # of the samples that are compared
STEPS = (5, 10, 25, 50, 100, 250)
BATCHES = 50  # whose gradients are compared
HISTORY = 10  # losses at each t that importance sampling remembers


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def draw(denoiser, process, n, config, sampler=SAMPLERS["ddpm"]):
    sampler = partial(sampler, process)
    return sample_batches(sampler, lambda indices: denoiser, lesson_1.IMAGE_SHAPE, n, config)


def bits_of(network, diffusion, experiment, **settings):
    """Bits per dimension of held-back digits, t and noise from the seed."""
    config, device = experiment.config, next(network.parameters()).device
    images = experiment.held_back.images[: config.num_samples].to(device)
    torch.manual_seed(config.seed)
    return bits_per_dim(diffusion, network, images.split(250), draws=4, **settings)._asdict()


def new_network(config, objective="hybrid"):
    torch.manual_seed(config.seed)
    return UNet(replace(NETWORK, out_channels=1) if objective == "simple" else NETWORK)


def objectives(config):
    """Nichol & Dhariwal 2021, table 2: L_vlb has the best bits, L_hybrid nearly, and a far better FID."""
    experiment = Experiment(LESSON, config)
    reference = reference_for(experiment.digits)
    shown = {}

    def measure(network, diffusion):
        samples = draw(network, diffusion.evenly(SHOWN_STEPS), config.num_samples, config)
        return quality(samples, reference) | bits_of(network, diffusion, experiment)

    for schedule in SCHEDULES:
        for objective in LOSSES:
            name, diffusion = f"{schedule}, {objective}", new_diffusion(schedule)
            network = new_network(config, objective)
            network = experiment.train(name, network, new_loss(objective, diffusion))
            experiment.row(measure, network, diffusion, schedule=schedule, objective=objective)
            shown[name] = draw(network, diffusion.evenly(SHOWN_STEPS), 16, config)
    experiment.save_rows(shown)


def few_steps(config):
    """Nichol & Dhariwal 2021, figure 8: learned variance holds at few steps, and below 50 DDIM is better."""
    network, diffusion, _ = load_network(None, LESSON, rebuild, config.device)
    experiment = Experiment(LESSON, config, weights_of=LESSON)
    reference = reference_for(experiment.digits)
    samplers = {
        "fixed small": partial(ddpm.ddpm_sample, log_variance=ddpm.fixed_small),
        "fixed large": partial(ddpm.ddpm_sample, log_variance=ddpm.fixed_large),
        "learned": partial(ddpm.ddpm_sample, log_variance=learned_range),
        "DDIM": ddim_sample,
    }

    def measure(sampler, steps):
        samples = draw(network, diffusion.evenly(steps), config.samples_at(steps), config, sampler)
        return quality(samples, reference)

    lines = {name: [] for name in samplers}
    for name, sampler in samplers.items():
        for steps in STEPS:
            row = experiment.row(measure, sampler, steps, sampler=name, steps=steps)
            lines[name].append((steps, row["fid"] - row["fid_floor"]))
    experiment.save(curves(lines, "steps", "FID above that of real digits"))


def lesson_1_bits(config):
    """Ho et al. 2020 sample well with either variance; as a code one of them is better."""
    network, diffusion, _ = load_network(None, "lesson_01_ddpm", lesson_1.rebuild, config.device)
    experiment = Experiment(LESSON, config, weights_of="lesson_01_ddpm")
    bits = {}
    for variance in (ddpm.fixed_small, ddpm.fixed_large):
        measure = partial(bits_of, network, diffusion, experiment, log_variance=variance)
        row = experiment.row(measure, variance=variance.__name__)
        bits[variance.__name__] = (row["bits_per_dim"], row["bits_per_dim_error"])
    experiment.save(bars(bits, "bits per dimension of lesson 1's network"))


def gradient_noise(config):
    """Nichol & Dhariwal 2021, section 3.3: importance sampling of t makes L_vlb's gradient less noisy."""
    network, diffusion, _ = load_network(None, LESSON, rebuild, config.device)
    experiment = Experiment(LESSON, config, weights_of=LESSON)
    digits, device = experiment.digits, next(network.parameters()).device
    network.requires_grad_(True)
    loss = ImportanceSampled(loss_vlb, diffusion, HISTORY)

    def chosen(indices):
        return digits.images[indices].to(device)

    def gradient(loss, batch):
        network.zero_grad()
        loss(network, batch).mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    def measure(loss):
        torch.manual_seed(config.seed)
        indices = torch.randint(len(digits), (BATCHES, 64))
        gradients = torch.stack([gradient(loss, chosen(i)) for i in indices])
        mean = gradients.mean(0)
        noise = (gradients - mean).square().sum(1).mean() / mean.square().sum()
        return {"batches": BATCHES, "noise_to_signal": noise.item()}

    def uniform(network, x_0):
        return ddpm.loss_at_random_t(loss_vlb, diffusion, network, x_0)

    experiment.row(measure, uniform, t="uniform")
    while loss.counts.min() < loss.losses.shape[1]:  # what is remembered, before it is used
        t = loss.counts.argsort()[:250]
        with torch.no_grad():
            x_0 = chosen(torch.randint(len(digits), (250,)))
            loss.remember(t, loss_vlb(diffusion, network, x_0, t, torch.randn_like(x_0)).cpu().double())
    experiment.row(measure, loss, t="by importance")
    lines = {"p_t by importance": list(enumerate(loss.probabilities().tolist(), 1))}
    experiment.save(curves(lines, "t + 1", "probability"))


def weighted_hybrid(weight, diffusion, network, x_0, label):
    """L_hybrid with the bound `weight` times as strong as it should be."""

    def loss(diffusion, denoiser, x_0, t, noise):
        output = diffusion.ask(denoiser, diffusion.q_sample(x_0, t, noise), t)
        simple = ddpm.squared_error(output, noise)
        return simple + weight * (loss_hybrid(diffusion, lambda x_t, t: output, x_0, t, noise) - simple)

    return ddpm.loss_at_random_t(loss, diffusion, network, x_0)


def leaking_hybrid(diffusion, network, x_0, label):
    """The mistake: L_hybrid whose bound also moves eps_hat."""

    def loss(diffusion, denoiser, x_0, t, noise):
        x_t = diffusion.q_sample(x_0, t, noise)
        output = diffusion.ask(denoiser, x_t, t)
        bits = vb_terms_bits(diffusion, output, x_0, x_t, t)
        return ddpm.squared_error(output, noise) + diffusion.num_timesteps / 1000 * bits

    return ddpm.loss_at_random_t(loss, diffusion, network, x_0)


def swapped_range(diffusion, output, x_t, t):
    """The mistake: v = 1 read as the small variance."""
    c = x_t.shape[1]
    return learned_range(diffusion, torch.cat([output[:, :c], -output[:, c:]], 1), x_t, t)


def unmapped(process, network):
    """The mistake: the network is told the step's number among the kept ones, not its timestep."""
    index = {timestep: i for i, timestep in enumerate(process.timesteps.tolist())}
    return lambda x_t, t: network(x_t, torch.tensor([index[i] for i in t.tolist()], device=x_t.device))


def mistakes(config):
    """Each bug beside the right version: bits per dimension, and samples."""
    experiment = Experiment(LESSON, config, steps=1000)
    reference = reference_for(experiment.digits)
    diffusion = new_diffusion()
    few = diffusion.evenly(SHOWN_STEPS)
    losses = {"right": new_loss("hybrid", diffusion)}
    losses["bound 1000 times too weak"] = partial(weighted_hybrid, 0.001, diffusion)
    losses["bound 1000 times too strong"] = partial(weighted_hybrid, 1000.0, diffusion)
    losses["bound moves eps_hat"] = partial(leaking_hybrid, diffusion)
    networks = {name: experiment.train(name, new_network(config), loss) for name, loss in losses.items()}
    right = networks["right"]
    swapped = partial(ddpm.ddpm_sample, log_variance=swapped_range)
    drawers = {name: partial(draw, network, few) for name, network in networks.items()}
    drawers["t un-mapped"] = partial(draw, unmapped(few, right), few)
    drawers["v swapped"] = partial(draw, right, few, sampler=swapped)

    def measure(name):
        settings = {"log_variance": swapped_range} if name == "v swapped" else {}
        bits = bits_of(networks.get(name, right), diffusion, experiment, **settings)
        return quality(drawers[name](config.num_samples, config), reference) | bits

    for name in drawers:
        experiment.row(measure, name, mistake=name)
    experiment.save_rows({name: drawer(16, config) for name, drawer in drawers.items()})
    experiment.save_losses(losses)


EXPERIMENTS = {f.__name__: f for f in (objectives, few_steps, lesson_1_bits, gradient_noise, mistakes)}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
