"""Lesson 6, measured: python lesson_06_miniglide/experiments.py errata

    errata    the original's mistakes that can be trained, each beside the right version, on drawn shapes

Writes results/errata.json and errata.png; interrupted, it goes on with the rows that are missing.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch.nn.functional import adaptive_avg_pool2d

from common.command import run_command
from common.data import to_pixels
from common.evaluation import fid_between
from common.experiments import Experiment, ExperimentConfig, run_experiment
from lesson_01_ddpm.diffusion import squared_error
from lesson_04_text_conditioning.velocity import loss_velocity, loss_velocity_simple
from lesson_05_cfg.guidance import drop_captions, loss_of_captions
from lesson_06_miniglide import shapes
from lesson_06_miniglide.captioned_images import NUM_DRAWN, as_batch, drawn_shapes, make_tokenizer
from lesson_06_miniglide.generate import LESSON, Generator
from lesson_06_miniglide.presets import PRESETS, new_diffusion, new_network, without_variance

SCALES = (1, 3)  # of guidance
SHOWN_STEPS = 50  # ancestral: the one sampler that uses the learned variance
SHOWN = ["a large red circle", "a blue square right of a white triangle", "three green triangles"]
SHOWN += ["a small red triangle", "a blue circle above a yellow square"]  # these two are held out


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def thumbnails(images):
    """[N, 3, 64, 64] -> [N, 192], colours at 8x8: enough to tell distributions of shapes apart."""
    return adaptive_avg_pool2d(images.clamp(-1, 1), 8).flatten(1)


def in_0_to_1(diffusion, denoiser, x_0, t, noise):
    """The mistake: images left in [0, 1], which our losses would refuse; without the bound."""
    eps_hat = diffusion.ask(denoiser, diffusion.q_sample((x_0 + 1) / 2, t, noise), t)[:, : x_0.shape[1]]
    return squared_error(eps_hat, noise) / diffusion.alpha_bar[t.cpu()].float().to(x_0.device)


def weak_bound(diffusion, denoiser, x_0, t, noise):
    """The mistake: 0.001 of one term of the bound, which stands for T of them."""
    simple = loss_velocity_simple(diffusion, denoiser, x_0, t, noise)
    return simple + (loss_velocity(diffusion, denoiser, x_0, t, noise) - simple) / diffusion.num_timesteps


def never_the_last(loss, diffusion, denoiser, x_0, t, noise):
    """The mistake: the last timestep is never trained."""
    return loss(diffusion, denoiser, x_0, t.clamp(max=diffusion.num_timesteps - 2), noise)


# name -> (the loss at t, the share of captions dropped)
VARIANTS = {
    "right": (loss_velocity, 0.2),
    "captions never dropped": (loss_velocity, 0.0),
    "simple": (loss_velocity_simple, 0.2),
    "bound 1000 times too weak": (weak_bound, 0.2),
    "last timestep never trained": (partial(never_the_last, loss_velocity), 0.2),
    "images in [0, 1]": (in_0_to_1, 0.2),
}


def errata(config):
    """Each mistake of the original for the same steps: how many samples show all that their caption says?"""
    experiment = Experiment(LESSON, config)
    data, real = drawn_shapes(NUM_DRAWN), drawn_shapes(config.num_samples, seed=1)
    diffusion, (settings, text, *_) = new_diffusion(1000), PRESETS["tiny"]
    tokenizer = make_tokenizer(data.captions, text)
    data, held_back = data.tokenized(tokenizer).split(0.02)
    captions = real.captions_of(torch.arange(config.num_samples))
    shown = {}

    def draw(name, generator, captions, scale):
        samples = generator.draw(captions, scale, config, SHOWN_STEPS, "ddpm")
        return 2 * samples - 1 if name == "images in [0, 1]" else samples

    def measure(name, generator, scale):
        samples = draw(name, generator, captions, scale)
        right = shapes.share_right(to_pixels(samples), captions)
        fid = fid_between(thumbnails(as_batch(real.images)), thumbnails(samples))
        return {"n": len(captions), "all_right": right, "fid_of_thumbnails": fid}

    for name, (at_t, drop) in VARIANTS.items():
        loss = loss_of_captions(at_t, diffusion, partial(drop_captions, probability=drop))
        torch.manual_seed(config.seed)
        learned = without_variance(settings) if name == "simple" else settings
        vocabulary = replace(text, vocab_size=tokenizer.vocab_size)
        network = new_network("tiny", learned, vocabulary, diffusion.alpha_bar)
        trained = experiment.train(
            name,
            network,
            loss,
            data=(data, held_back.first(256)),
            batch_size=32,
            learning_rate=1e-3,
            ema_decay=0.999,
        )
        generator = Generator(trained, diffusion, tokenizer)
        for scale in SCALES:
            experiment.row(measure, name, generator, scale, variant=name, guidance_scale=scale)
        shown[name] = draw(name, generator, SHOWN * 2, 3)
    experiment.save_rows(shown)
    experiment.save_losses(VARIANTS)


EXPERIMENTS = {f.__name__: f for f in (errata,)}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
