"""Lesson 5: train with caption dropout, then draw from captions at several guidance scales, and measure.

python lesson_05_cfg/train_mnist.py
"""

from dataclasses import dataclass
from functools import partial

import torch

from common.captions import balanced_prompts
from common.command import run_command
from common.data import load_splits
from common.evaluation import evaluate, in_words, reference_for
from common.pictures import label_grid
from common.runs import Run, saved_config
from common.sampling import sample_batches
from common.training import MuonConfig, train
from lesson_02_improved_ddpm.train_mnist import new_diffusion
from lesson_04_text_conditioning import captioned_mnist
from lesson_04_text_conditioning.captioned_mnist import IMAGE_SHAPE, PROMPTS, TokenizedDigits
from lesson_04_text_conditioning.velocity import loss_velocity
from lesson_05_cfg.dpm_solver import dpm_solver_sample
from lesson_05_cfg.guidance import drop_captions, guided, loss_of_captions
from lesson_05_cfg.timesteps import mostly_large

SWEEP = (0, 1, 2, 3, 4, 7, 10, 20)
SHOWN = 3  # the scale of the pictures along the way


@dataclass(frozen=True)
class Config(MuonConfig):
    """Lesson 5: a text-to-image model of coloured digits, trained so that it can be guided."""

    drop_caption: float = 0.1  # share of captions replaced by the empty one
    sample_steps: int = 15  # of DPM-Solver++ a sample
    num_eval: int = 1000  # samples measured at each guidance scale

    default_steps = 2000
    default_minutes = 45.0  # for slow machines; where bf16 is fast two cores take 9


def main(config):
    digits, held_back = load_splits(config)
    run = Run("lesson_05_cfg", config, digits.name)
    tokenizer = captioned_mnist.train_tokenizer()
    torch.manual_seed(config.seed)
    network, facts = captioned_mnist.new_network(tokenizer)
    diffusion = new_diffusion()

    drop = partial(drop_captions, probability=config.drop_caption)
    # NEW: some learn without their caption, and most where captions count
    loss = loss_of_captions(loss_velocity, diffusion, drop, draw_t=mostly_large)

    def draw(network, prompts, scale):
        sampler = partial(dpm_solver_sample, diffusion.evenly(config.at_most(config.sample_steps)))
        denoiser_for = partial(guided, guidance_scale=scale)  # NEW: guided, and in few steps
        denoiser_of = captioned_mnist.denoiser_of_prompts(network, tokenizer, prompts, denoiser_for)
        return sample_batches(sampler, denoiser_of, IMAGE_SHAPE, len(prompts), config)

    def show(network):
        return label_grid(draw(network, PROMPTS * 4, SHOWN), column_labels=PROMPTS)

    torch.manual_seed(0)
    validation = TokenizedDigits(held_back, tokenizer).batch(torch.arange(config.at_most(512)))
    network = train(network, loss, TokenizedDigits(digits, tokenizer), config, run, validation, facts, show)
    sweep(partial(draw, network), config.at_most(config.num_eval), run, reference_for(digits))


def sweep(draw, n, run, reference):
    """Draw and measure n samples at every guidance scale: sweep.png and metrics.json."""
    prompts, wanted_digits, wanted_colours = balanced_prompts(n)
    rows = []
    print(f"{n} samples a scale; the colour and the digit are read from each")
    for scale in SWEEP:
        measured = evaluate(draw(prompts, scale), reference, wanted_digits, wanted_colours)
        rows.append({"guidance_scale": scale, **measured})
        print(in_words(rows[-1]), flush=True)
    images = torch.cat([draw(PROMPTS, scale) for scale in SWEEP])
    names = [f"s = {scale}" for scale in SWEEP]
    run.finish({"sweep": rows}, "sweep.png", label_grid(images, row_labels=names, column_labels=PROMPTS))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
