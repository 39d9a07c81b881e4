"""Lesson 1: train a DDPM on MNIST, draw digits with it, and measure them.

python lesson_01_ddpm/train_mnist.py
"""

from dataclasses import asdict, dataclass
from functools import partial

import torch

from common.command import run_command
from common.data import load_splits
from common.evaluation import reference_for, report
from common.pictures import label_grid
from common.runs import Run, as_config, saved_config
from common.sampling import sample_batches
from common.training import DigitsConfig, train
from lesson_01_ddpm import diffusion as ddpm
from lesson_01_ddpm.unet import UNet, UNetConfig

IMAGE_SHAPE = (1, 32, 32)
# Half the channels at 32x32: that is where the time goes, and digits need little there.
NETWORK = UNetConfig(channel_mult=(0.5, 1, 2, 2))


@dataclass(frozen=True)
class Config(DigitsConfig):
    """Lesson 1: a diffusion model of handwritten digits."""

    sample_steps: int = 1000  # ancestral steps of the final picture
    eval_steps: int = 100  # ancestral steps of the samples that are measured
    num_eval: int = 500  # samples measured

    default_minutes = 8.0


def new_diffusion():
    return ddpm.GaussianDiffusion(ddpm.linear_betas(1000))


def rebuild(facts):
    """The network and the diffusion that a checkpoint's facts describe."""
    return UNet(as_config(UNetConfig, facts["network"])), new_diffusion()


def main(config):
    digits, held_back = load_splits(config)
    run = Run("lesson_01_ddpm", config, digits.name)
    torch.manual_seed(config.seed)
    network, facts = UNet(NETWORK), {"network": asdict(NETWORK)}
    diffusion = new_diffusion()

    def loss(network, x_0, label):
        return ddpm.loss_at_random_t(ddpm.loss_simple, diffusion, network, x_0)

    def draw(network, n, steps):
        sampler = partial(ddpm.ddpm_sample, diffusion.evenly(config.at_most(steps)))
        return sample_batches(sampler, lambda indices: network, IMAGE_SHAPE, config.at_most(n), config)

    def show(network):
        return label_grid(draw(network, 32, 50))

    validation = held_back.batch(torch.arange(config.at_most(512)))
    network = train(network, loss, digits, config, run, validation, facts, show)
    measured = draw(network, config.num_eval, config.eval_steps)
    report(run, measured, reference_for(digits), draw(network, 64, config.sample_steps))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
