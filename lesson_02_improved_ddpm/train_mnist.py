"""Lesson 2: the digits of lesson 1 with the cosine schedule, a learned variance and L_hybrid.

python lesson_02_improved_ddpm/train_mnist.py
"""

from dataclasses import asdict, dataclass, replace
from functools import partial

import torch

from common.command import check_choice, pick_device, run_command
from common.data import load_splits
from common.evaluation import reference_for, report
from common.pictures import label_grid
from common.runs import Run, saved_config
from common.sampling import sample_batches
from common.training import DigitsConfig, train
from lesson_01_ddpm import train_mnist as lesson_1
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas, loss_at_random_t, loss_simple
from lesson_01_ddpm.unet import UNet
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.importance_sampling import ImportanceSampled
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_02_improved_ddpm.variational_bound import bits_per_dim, loss_hybrid, loss_vlb

NETWORK = replace(lesson_1.NETWORK, out_channels=2)  # NEW: eps_hat and v
SCHEDULES = {"linear": linear_betas, "cosine": cosine_betas}
LOSSES = {"simple": loss_simple, "hybrid": loss_hybrid, "vlb": loss_vlb}


@dataclass(frozen=True)
class Config(DigitsConfig):
    """Lesson 2: a diffusion model of handwritten digits that learns its variance."""

    objective: str = "hybrid"  # simple (lesson 1's), hybrid, or vlb (the bound alone, t by importance)
    schedule: str = "cosine"  # or linear (lesson 1's)
    sample_steps: int = 100  # ancestral steps a sample
    num_eval: int = 500  # samples measured

    fixed = ("objective", "schedule")
    default_minutes = 8.0


def new_diffusion(schedule="cosine"):
    return GaussianDiffusion(SCHEDULES[schedule](1000))  # NEW


def new_loss(objective, diffusion):
    """(network, x_0, label) -> [N], whatever the label."""
    if objective == "vlb":
        return ImportanceSampled(loss_vlb, diffusion)
    at_t = LOSSES[objective]
    return lambda network, x_0, label: loss_at_random_t(at_t, diffusion, network, x_0)


def rebuild(facts):
    return lesson_1.rebuild(facts)[0], new_diffusion(facts["config"].get("schedule", "cosine"))


def main(config):
    check_choice("--objective", config.objective, LOSSES)
    check_choice("--schedule", config.schedule, SCHEDULES)
    digits, held_back = load_splits(config)
    run = Run("lesson_02_improved_ddpm", config, digits.name)
    torch.manual_seed(config.seed)
    settings = replace(NETWORK, out_channels=1) if config.objective == "simple" else NETWORK
    network, facts = UNet(settings), {"network": asdict(settings)}
    diffusion = new_diffusion(config.schedule)
    loss = new_loss(config.objective, diffusion)  # NEW: L_hybrid

    def draw(network, n, steps):
        sampler = partial(SAMPLERS["ddpm"], diffusion.evenly(config.at_most(steps)))
        n = config.at_most(n)
        return sample_batches(sampler, lambda indices: network, lesson_1.IMAGE_SHAPE, n, config)

    def show(network):
        return label_grid(draw(network, 32, 50))

    validation = held_back.batch(torch.arange(config.at_most(512)))
    network = train(network, loss, digits, config, run, validation, facts, show)
    samples = draw(network, config.num_eval, config.sample_steps)
    unseen = held_back.images[: config.at_most(1000)].split(250)
    bits = bits_per_dim(diffusion, network, [x.to(pick_device(config.device)) for x in unseen], draws=4)
    report(run, samples, reference_for(digits), samples[:64], numbers=bits._asdict())  # NEW: in bits, too


if __name__ == "__main__":
    run_command(main, Config, saved_config)
