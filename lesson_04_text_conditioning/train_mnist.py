"""Lesson 4: coloured digits from captions.

python lesson_04_text_conditioning/train_mnist.py
"""

from dataclasses import dataclass
from functools import partial

import torch

from common.captions import balanced_prompts
from common.command import run_command
from common.data import load_splits
from common.evaluation import reference_for, report
from common.pictures import label_grid
from common.runs import Run, saved_config
from common.sampling import sample_batches
from common.training import MuonConfig, train
from lesson_01_ddpm.diffusion import loss_at_random_t
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_04_text_conditioning import captioned_mnist
from lesson_04_text_conditioning.captioned_mnist import IMAGE_SHAPE, PROMPTS, TokenizedDigits
from lesson_04_text_conditioning.velocity import loss_velocity


@dataclass(frozen=True)
class Config(MuonConfig):
    """Lesson 4: a text-to-image model of coloured digits."""

    sample_steps: int = 100  # ancestral steps a sample
    num_eval: int = 500  # samples measured

    default_minutes = 45.0  # for slow machines


def main(config):
    digits, held_back = load_splits(config)
    run = Run("lesson_04_text_conditioning", config, digits.name)
    tokenizer = captioned_mnist.train_tokenizer()
    torch.manual_seed(config.seed)
    network, facts = captioned_mnist.new_network(tokenizer)
    diffusion = new_diffusion()

    def loss(network, x_0, tokens, mask):
        text = network.encode_text(tokens, mask)  # NEW: a caption instead of a class
        return loss_at_random_t(loss_velocity, diffusion, partial(network, text=text), x_0)

    def draw(network, prompts, steps):
        sampler = partial(SAMPLERS["ddpm"], diffusion.evenly(config.at_most(steps)))
        denoiser_of = captioned_mnist.denoiser_of_prompts(network, tokenizer, prompts)
        return sample_batches(sampler, denoiser_of, IMAGE_SHAPE, len(prompts), config)

    def show(network):
        return label_grid(draw(network, PROMPTS * 4, 50), column_labels=PROMPTS)

    torch.manual_seed(0)
    validation = TokenizedDigits(held_back, tokenizer).batch(torch.arange(config.at_most(512)))
    network = train(network, loss, TokenizedDigits(digits, tokenizer), config, run, validation, facts, show)
    prompts, wanted, colours = balanced_prompts(config.at_most(config.num_eval))
    samples = draw(network, prompts, config.sample_steps)
    picture = draw(network, PROMPTS * config.at_most(8), config.sample_steps)
    report(run, samples, reference_for(digits), picture, wanted, colours, column_labels=PROMPTS)


if __name__ == "__main__":
    run_command(main, Config, saved_config)
