"""Lesson 2: the digits of lesson 1 with the cosine schedule, a learned variance and L_hybrid.

python lesson_02_improved_ddpm/train_mnist.py
"""

from dataclasses import asdict, dataclass, replace

import torch

from common.command import run_command
from common.data import load_digits
from common.evaluation import reference_for, report
from common.pictures import save_grid
from common.runs import Run, saved_config
from common.sampling import sample_batches
from common.training import TrainConfig, train
from lesson_01_ddpm.diffusion import GaussianDiffusion, loss_at_random_t
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE
from lesson_01_ddpm.train_mnist import NETWORK as LESSON_1
from lesson_01_ddpm.unet import UNet
from lesson_02_improved_ddpm.sampling import SAMPLERS
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_02_improved_ddpm.variational_bound import loss_hybrid

NETWORK = replace(LESSON_1, out_channels=2)  # NEW: eps_hat and v


@dataclass(frozen=True)
class Config(TrainConfig):
    """Lesson 2: a diffusion model of handwritten digits that learns its variance."""

    sample_steps: int = 100  # ancestral steps a sample
    num_eval: int = 500  # samples measured

    default_minutes = 8.0


def new_diffusion():
    return GaussianDiffusion(cosine_betas(1000))  # NEW


def main(config):
    digits, held_back = (load_digits(config.dataset, config.data_dir, train) for train in (True, False))
    run = Run("lesson_02_improved_ddpm", config, digits.name)
    torch.manual_seed(config.seed)
    network, facts = UNet(NETWORK), {"network": asdict(NETWORK)}
    diffusion = new_diffusion()

    def loss(network, x_0, label):
        return loss_at_random_t(loss_hybrid, diffusion, network, x_0)  # NEW: L_hybrid

    def draw(network, n, sampler, steps):
        few = diffusion.evenly(2 if config.dry_run else steps)
        return sample_batches(
            lambda _, x_T, generator: SAMPLERS[sampler](few, network, x_T, generator),
            IMAGE_SHAPE, 2 if config.dry_run else n, config.seed, config.device,
        )  # fmt: skip

    def show(network, step):
        save_grid(run.folder / "samples" / f"step_{step:07d}.png", draw(network, 32, "ddim", 25))

    network = train(network, loss, digits, config, run, held_back.batch(torch.arange(512)), facts, show)
    samples = draw(network, config.num_eval, "ddpm", config.sample_steps)
    report(run, samples, reference_for(digits), picture=samples[:64])


if __name__ == "__main__":
    run_command(main, Config, saved_config)
