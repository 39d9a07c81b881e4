"""Experiments on drawn shapes, and the first of them: the original's errata. Run by experiments.py."""

from dataclasses import asdict, replace
from functools import partial

import torch

from common.command import pick_device
from common.data import to_pixels
from common.evaluation import fid_between
from common.experiments import Experiment
from lesson_01_ddpm.diffusion import squared_error
from lesson_04_text_conditioning.velocity import loss_velocity, loss_velocity_simple
from lesson_05_cfg.guidance import drop_captions, loss_of_captions
from lesson_06_miniglide import shapes
from lesson_06_miniglide.captioned_images import NUM_DRAWN, as_batch, drawn_shapes, make_tokenizer
from lesson_06_miniglide.evaluate import thumbnails
from lesson_06_miniglide.generate import LESSON, Generator
from lesson_06_miniglide.inpainting import widened
from lesson_06_miniglide.presets import PRESETS, new_diffusion, new_network, without_variance
from lesson_06_miniglide.sketch import learn_to_sketch
from lesson_06_miniglide.train import Config

BATCH = 32  # images a step, fewer than the presets take: more steps in the same time
SCALES = (1, 3)  # of guidance
SHOWN_STEPS = 50  # ancestral: the one sampler that uses the learned variance
SHOWN = ["a large red circle", "a blue square right of a white triangle", "three green triangles"]
SHOWN += ["a small red triangle", "a blue circle above a yellow square"]  # these two are held out


class Shapes(Experiment):
    """An experiment on drawn shapes; `captions` and `real` are of pictures that are in no training."""

    def __init__(self, config, **settings):
        super().__init__(LESSON, config, **settings)
        data = drawn_shapes(NUM_DRAWN)
        self.tokenizer = make_tokenizer(data.captions, PRESETS["tiny"].text)
        self.data, held_back = data.tokenized(self.tokenizer).split(0.02)
        self.validation = held_back.first(256)
        drawn = drawn_shapes(config.num_samples, seed=1)
        self.captions = drawn.captions_of(torch.arange(config.num_samples))
        self.real = as_batch(drawn.images)

    def generator(self, name, preset="tiny", at_t=loss_velocity, drop=0.2, task=None, start_from=None):
        """Train a preset's network. at_t: any but loss_velocity learns no variance. task: another than its
        own. start_from: a Generator to begin with."""
        settings, text, *_ = PRESETS[preset]
        diffusion = new_diffusion(1000, preset)
        text = replace(text, vocab_size=self.tokenizer.vocab_size)
        settings = settings if at_t is loss_velocity else without_variance(settings)
        dropped = partial(drop_captions, probability=drop)
        loss = loss_of_captions(at_t, diffusion, dropped, task or PRESETS[preset].task)
        torch.manual_seed(self.config.seed)
        network = new_network(preset, settings, text, diffusion.alpha_bar)
        if start_from:
            network.load_state_dict(widened(start_from.network.state_dict(), network))
        elif PRESETS[preset].sketching and not self.has_begun(name):
            steps = min(PRESETS[preset].sketching, self.config.steps)
            learn_to_sketch(network.to(pick_device(self.config.device)), self.data, steps, self.config.seed)
        facts = {"network": asdict(settings), "text": asdict(text), "tokenizer": self.tokenizer.to_json()}
        facts["prompts"] = SHOWN
        of_train = {"preset": preset, "learning_rate": PRESETS[preset].learning_rate, "drop_caption": drop}
        of_train |= {"optimizer": PRESETS[preset].optimizer, "batch_size": BATCH, "checkpoint_every": 500}
        data = (self.data, self.validation)
        trained = self.train(name, network, loss, data=data, metadata=facts, kind=Config, **of_train)
        return Generator(trained, diffusion, self.tokenizer)

    def all_right(self, samples):
        """The share of samples that show all that their caption says."""
        return shapes.share_right(to_pixels(samples), self.captions[: len(samples)])


def in_0_to_1(diffusion, denoiser, x_0, t, noise):
    """The mistake: images left in [0, 1], which our losses would refuse; with L_simple."""
    eps_hat = diffusion.ask(denoiser, diffusion.q_sample((x_0 + 1) / 2, t, noise), t)[:, : x_0.shape[1]]
    return squared_error(eps_hat, noise) / diffusion.alpha_bar[t.cpu()].float().to(x_0.device)


# name -> (the loss at t, the share of captions dropped). For what is wrong with the bound see lesson 2's.
ERRATA = {
    "right": (loss_velocity, 0.2),
    "captions never dropped": (loss_velocity, 0.0),
    "simple": (loss_velocity_simple, 0.2),
    "images in [0, 1]": (in_0_to_1, 0.2),
}


def errata(config):
    """Each mistake of the original for the same steps: how many samples show all that their caption says?"""
    experiment, shown = Shapes(config), {}

    def draw(name, generator, captions, scale):
        samples = generator.draw(captions, scale, config, SHOWN_STEPS, "ddpm")
        return 2 * samples - 1 if name == "images in [0, 1]" else samples

    def measure(name, generator, scale):
        samples = draw(name, generator, experiment.captions, scale)
        fid = fid_between(*(thumbnails(to_pixels(images)) for images in (experiment.real, samples)))
        return {"n": len(samples), "all_right": experiment.all_right(samples), "fid_of_thumbnails": fid}

    for name, (at_t, drop) in ERRATA.items():
        generator = experiment.generator(name, at_t=at_t, drop=drop)
        for scale in SCALES:
            experiment.row(measure, name, generator, scale, variant=name, guidance_scale=scale)
        shown[name] = draw(name, generator, SHOWN * 2, 3)
    experiment.save_rows(shown)
    experiment.save_losses(ERRATA)
