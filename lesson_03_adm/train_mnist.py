"""Lesson 3: the ADM UNet, told which digit to draw.

python lesson_03_adm/train_mnist.py
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
from common.training import MuonConfig, train
from lesson_01_ddpm.diffusion import loss_at_random_t
from lesson_01_ddpm.train_mnist import IMAGE_SHAPE
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_03_adm.adm_unet import ADMConfig, ClassUNet

# NEW: AdaGN, residual blocks that resample, attention at two resolutions in heads of 32 channels
NETWORK = ADMConfig(
    out_channels=2, channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4), num_head_channels=32
)


@dataclass(frozen=True)
class Config(MuonConfig):
    """Lesson 3: a diffusion model of handwritten digits that draws the digit asked for."""

    sample_steps: int = 100  # ancestral steps a sample
    num_eval: int = 500  # samples measured

    default_minutes = 45.0  # for slow machines


def rebuild(facts):
    return ClassUNet(as_config(ADMConfig, facts["network"])), new_diffusion()


def denoiser_of_classes(network, classes):
    """What common.sampling asks for: (indices) -> a denoiser for samples of classes[indices]."""
    classes = classes.to(next(network.parameters()).device)
    return lambda indices: partial(network, y=classes[indices.to(classes.device)])


def main(config):
    digits, held_back = load_splits(config)
    run = Run("lesson_03_adm", config, digits.name)
    torch.manual_seed(config.seed)
    network, facts = ClassUNet(NETWORK), {"network": asdict(NETWORK)}
    diffusion = new_diffusion()

    def loss(network, x_0, label):
        return loss_at_random_t(loss_hybrid, diffusion, partial(network, y=label), x_0)  # NEW: with the class

    def draw(network, classes, steps):
        sampler = partial(SAMPLERS["ddpm"], diffusion.evenly(config.at_most(steps)))
        denoiser_of = denoiser_of_classes(network, classes)
        return sample_batches(sampler, denoiser_of, IMAGE_SHAPE, len(classes), config)

    def show(network):
        return label_grid(draw(network, torch.arange(40) % 10, 50), columns=10)

    validation = held_back.batch(torch.arange(config.at_most(512)))
    network = train(network, loss, digits, config, run, validation, facts, show)
    wanted = torch.arange(config.at_most(config.num_eval)) % 10
    samples = draw(network, wanted, config.sample_steps)
    report(run, samples, reference_for(digits), samples[:80], wanted, columns=10)


if __name__ == "__main__":
    run_command(main, Config, saved_config)
