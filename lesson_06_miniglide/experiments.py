"""Lesson 6, measured: python lesson_06_miniglide/experiments.py NAME

    errata         the original's mistakes that can be trained, each beside the right version, on drawn shapes
    upsampling     16 to 64 pixels, trained with and without noise: on real pictures, and on samples
    inpainting     a network trained to fill holes, and one that was not, on the same holes
    retrieval      how much noise a CLIP can read through, on captioned digits
    clip_guidance  its gradient beside classifier-free guidance

Each writes results/NAME.json and NAME.png; interrupted, it goes on with the rows that are missing.
"""

import random
import time
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from common.captions import CAPTIONS, VARIANTS, CaptionedDigits, balanced_prompts
from common.command import run_command
from common.data import to_pixels
from common.evaluation import fid_between
from common.experiments import Experiment, ExperimentConfig, quality, run_experiment
from common.pictures import curves
from common.sampling import load_network, sample_batches
from lesson_01_ddpm.diffusion import squared_error
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_03_adm.adm_unet import ADMConfig
from lesson_03_adm.classifier_guidance import guide_mean
from lesson_04_text_conditioning import captioned_mnist
from lesson_04_text_conditioning.captioned_mnist import denoiser_of_prompts
from lesson_04_text_conditioning.experiments import Captioned
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.velocity import loss_velocity, loss_velocity_simple
from lesson_05_cfg.guidance import drop_captions, guided, loss_of_captions
from lesson_06_miniglide import shapes
from lesson_06_miniglide.captioned_images import NUM_DRAWN, as_batch, drawn_shapes, make_tokenizer
from lesson_06_miniglide.clip import NoisyCLIP, clip_gradient, loss_clip, retrieval_accuracy
from lesson_06_miniglide.editing import inpaint_sample
from lesson_06_miniglide.generate import LESSON, Generator
from lesson_06_miniglide.inpainting import random_mask, widened
from lesson_06_miniglide.presets import PRESETS, new_diffusion, new_network, without_variance
from lesson_06_miniglide.upsampler import LOW_RES, enlarge, noised, shrink

SCALES = (1, 3)  # of guidance
SHOWN_STEPS = 50  # ancestral: the one sampler that uses the learned variance
SHOWN = ["a large red circle", "a blue square right of a white triangle", "three green triangles"]
SHOWN += ["a small red triangle", "a blue circle above a yellow square"]  # these two are held out
LEVELS = (0, 50, 100, 200, 400)  # of the noise that an upsampler sees its small picture in
TIMES = (1, 5)  # each step is taken, by a network that was not trained to repaint
CLIP_SCALES = (0, 30, 100, 300, 1000)
CLIP_IMAGES = ADMConfig(in_channels=3, channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4))
NOISE = (0, 200, 400, 600, 700, 800, 900, 999)  # timesteps at which CLIP is asked


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


class Shapes(Experiment):
    """An experiment on drawn shapes; `captions` and `real` are of pictures that are in no training."""

    def __init__(self, config):
        super().__init__(LESSON, config)
        data = drawn_shapes(NUM_DRAWN)
        self.tokenizer = make_tokenizer(data.captions, PRESETS["tiny"].text)
        self.data, held_back = data.tokenized(self.tokenizer).split(0.02)
        self.validation = held_back.first(256)
        drawn = drawn_shapes(config.num_samples, seed=1)
        self.captions = drawn.captions_of(torch.arange(config.num_samples))
        self.real = as_batch(drawn.images)

    def generator(self, name, preset="tiny", at_t=loss_velocity, drop=0.2, task=None, start_from=None):
        """Train a preset's network. at_t: without L_vlb's part it learns no variance. task: another than its
        own. start_from: a Generator to begin with."""
        settings, text, *_ = PRESETS[preset]
        diffusion = new_diffusion(1000, preset)
        text = replace(text, vocab_size=self.tokenizer.vocab_size)
        settings = without_variance(settings) if at_t is loss_velocity_simple else settings
        dropped = partial(drop_captions, probability=drop)
        loss = loss_of_captions(at_t, diffusion, dropped, task or PRESETS[preset].task)
        torch.manual_seed(self.config.seed)
        network = new_network(preset, settings, text, diffusion.alpha_bar)
        if start_from:
            network.load_state_dict(widened(start_from.network.state_dict(), network))
        of_tiny = {"batch_size": 32, "learning_rate": 1e-3, "ema_decay": 0.999}
        trained = self.train(name, network, loss, data=(self.data, self.validation), **of_tiny)
        return Generator(trained, diffusion, self.tokenizer)

    def all_right(self, samples):
        """The share of samples that show all that their caption says."""
        return shapes.share_right(to_pixels(samples), self.captions[: len(samples)])


def thumbnails(images):
    """[N, 3, 64, 64] -> [N, 192], colours at 8x8: enough to tell distributions of shapes apart."""
    return F.adaptive_avg_pool2d(images.clamp(-1, 1), 8).flatten(1)


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
ERRATA = {
    "right": (loss_velocity, 0.2),
    "captions never dropped": (loss_velocity, 0.0),
    "simple": (loss_velocity_simple, 0.2),
    "bound 1000 times too weak": (weak_bound, 0.2),
    "last timestep never trained": (partial(never_the_last, loss_velocity), 0.2),
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
        fid = fid_between(thumbnails(experiment.real), thumbnails(samples))
        return {"n": len(samples), "all_right": experiment.all_right(samples), "fid_of_thumbnails": fid}

    for name, (at_t, drop) in ERRATA.items():
        generator = experiment.generator(name, at_t=at_t, drop=drop)
        for scale in SCALES:
            experiment.row(measure, name, generator, scale, variant=name, guidance_scale=scale)
        shown[name] = draw(name, generator, SHOWN * 2, 3)
    experiment.save_rows(shown)
    experiment.save_losses(ERRATA)


# -- enlarging -----------------------------------------------------------------------------------------------


def enlarge_clean(diffusion, network, x_0):
    """The task without noise conditioning: small pictures as they are."""
    return x_0, noised(diffusion, shrink(x_0, LOW_RES), torch.zeros(len(x_0), dtype=torch.int64))


def details(images):
    """[N, 3, 64, 64] -> [16 N, 192], pieces of 8x8 pixels: what edges look like."""
    return F.unfold(images.clamp(-1, 1), 8, stride=16).transpose(1, 2).flatten(0, 1)


def psnr(images, real):
    """Peak signal to noise ratio in decibels; the peak is 2, from -1 to 1."""
    return (10 * (4 / (images.clamp(-1, 1) - real).square().mean()).log10()).item()


def upsampling(config):
    """Ho et al. 2022, section 4: noise costs sharpness on real pictures, and is what makes samples of another
    network fit to be enlarged."""
    experiment = Shapes(config)
    small = experiment.generator("small", "tiny_small")
    upsamplers = {"trained with noise": experiment.generator("noise", "tiny_upsampler", task=enlarge)}
    upsamplers["without"] = experiment.generator("no noise", "tiny_upsampler", task=enlarge_clean)
    captions, real = experiment.captions, experiment.real
    sources = {"real": shrink(real, LOW_RES), "samples": small.draw(captions, 3, config)}
    sizes = {"size": real.shape[2:], "mode": "bicubic", "antialias": False}
    lines = {}

    def enlarged(name, source, level, n=None):
        """The first n of a source, or all."""
        said, low_res = captions[:n], sources[source][:n]
        if name == "bicubic":
            return F.interpolate(low_res, **sizes)
        return upsamplers[name].enlarge(low_res, said, level, config)

    def measure(name, source, level):
        images = enlarged(name, source, level)
        return {
            "n": len(images),
            "psnr": psnr(images, real) if source == "real" else None,
            "all_right": experiment.all_right(images),
            "fid_of_details": fid_between(details(real), details(images)),
        }

    for source in sources:
        for name in ("bicubic", *upsamplers):
            levels = LEVELS if name == "trained with noise" else (0,)
            for level in levels:
                row = experiment.row(measure, name, source, level, upsampler=name, source=source, level=level)
                if name in upsamplers:
                    lines.setdefault(f"{name}, {source}", []).append((level + 10, row["fid_of_details"]))
    shown = {"samples, 16x16": F.interpolate(sources["samples"][:8], real.shape[2:])}
    shown |= {name: enlarged(name, "samples", 0, 8) for name in ("bicubic", *upsamplers)}
    shown |= {f"noise {level}": enlarged("trained with noise", "samples", level, 8) for level in LEVELS[1:]}
    experiment.save_rows(shown)
    experiment.save(curves(lines, "level of noise + 10", "FID of details"), "_curve")


# -- filling holes -------------------------------------------------------------------------------------------


def jump(images, known):
    """The mean step between neighbouring pixels of which one is known and one is drawn: a seam shows."""
    pairs = []
    for axis in (2, 3):
        n = images.shape[axis] - 1
        edge = known.narrow(axis, 0, n) != known.narrow(axis, 1, n)
        step = (images.narrow(axis, 0, n) - images.narrow(axis, 1, n)).abs()
        pairs.append(step.mean(1, keepdim=True)[edge])
    return torch.cat(pairs).mean().item()


def holes(n, seed=0):
    """float [n, 1, 64, 64], 1 where known; something is known in each."""
    rng, masks = random.Random(seed), []
    while len(masks) < n:
        mask = random_mask(64, rng)
        masks += [mask] if mask.any() else []
    return torch.from_numpy(np.stack(masks)).float()[:, None]


def inpainting(config):
    """Nichol et al. 2022, section 2.4, and Lugmayr et al. 2022: trained to repaint, or made to."""
    experiment = Shapes(config)
    base = experiment.generator("base")
    trained = experiment.generator("inpainting", "tiny_inpainting", start_from=base)
    captions, real, known = experiment.captions, experiment.real, holes(config.num_samples)

    def repainted(way):
        """Each hole filled; batches of 250, for a hole belongs to its sample."""
        parts = []
        for i in torch.arange(len(real)).split(250):
            image, mask, prompts = real[i], known[i], [captions[j] for j in i.tolist()]
            if way == "trained":

                def bound(x_0, image=image, mask=mask):
                    return torch.where(mask.to(x_0.device) > 0, image.to(x_0.device), x_0.clamp(-1, 1))

                sampler, seen = partial(SAMPLERS["ddpm"], bound=bound), {"image": image, "mask": mask}
                parts.append(trained.draw(prompts, 3, config, SHOWN_STEPS, sampler, **seen))
            else:
                sampler = partial(inpaint_sample, image=image, known=mask, times=way)
                parts.append(base.draw(prompts, 3, config, SHOWN_STEPS, sampler))
        return torch.cat(parts)

    def measure(way):
        started = time.monotonic()
        images = real if way == "real" else repainted(way)
        return {
            "n": len(images),
            "all_right": experiment.all_right(images),
            "jump_at_the_edge": jump(images, known),
            "seconds_a_sample": (time.monotonic() - started) / len(images),
        }

    names = {f"untrained, {times} times": times for times in TIMES}
    names = {"real": "real", "trained": "trained"} | names
    for name, way in names.items():
        experiment.row(measure, way, way=name)
    real, known, captions = real[:8], known[:8], captions[:8]
    shown = {"the hole": real * known} | {n: real if w == "real" else repainted(w) for n, w in names.items()}
    experiment.save_rows(shown)


# -- CLIP ----------------------------------------------------------------------------------------------------


class Digits(Captioned):
    lesson = LESSON


def trained_clip(experiment, diffusion):
    """The CLIP of captioned digits, which `retrieval` and `clip_guidance` share."""
    tokenizer = experiment.tokenizer
    torch.manual_seed(experiment.config.seed)
    clip = NoisyCLIP(CLIP_IMAGES, TextConfig(tokenizer.vocab_size, tokenizer.context))
    return experiment.train("clip", clip, partial(loss_clip, diffusion))


@torch.no_grad()
def embedded(clip, tokenizer, captions):
    device = next(clip.parameters()).device
    return clip.embed_captions(*(x.to(device) for x in tokenizer.encode(captions)))


def retrieval(config):
    """Of seventy captions, which is this picture's? The more noise there is in it, the fewer are found."""
    experiment, diffusion = Digits(config, trainings="clip"), captioned_mnist.new_diffusion()
    clip, line = trained_clip(experiment, diffusion), []
    data = CaptionedDigits(experiment.held_back, named=1.0)
    x_0, index = data.batch(torch.arange(min(config.num_samples, len(data))))
    said = index // VARIANTS * VARIANTS  # any wording is right: the first stands for all
    places = said.unique()
    captions = embedded(clip, experiment.tokenizer, [CAPTIONS[i] for i in places.tolist()])
    x_0, right = x_0.to(captions.device), torch.searchsorted(places, said).to(captions.device)

    def measure(t):
        torch.manual_seed(config.seed)
        found = retrieval_accuracy(diffusion, clip, x_0, captions, right, t)
        return {"n": len(x_0), "of": len(places), "found": found}

    for t in NOISE:
        line.append((t + 1, experiment.row(measure, t, t=t)["found"]))
    experiment.save(curves({"captions found": line}, "t + 1", "share of the pictures"))


def clip_guidance(config):
    """Nichol et al. 2022, section 5: at the same diversity, guidance without a classifier wins."""
    network, diffusion, _ = load_network(None, "lesson_05_cfg", captioned_mnist.rebuild)
    experiment, lines = Digits(config, weights_of="lesson_05_cfg", trainings="clip"), {}
    tokenizer, clip = experiment.tokenizer, trained_clip(experiment, diffusion)
    prompts, digits, colours = balanced_prompts(config.num_samples)
    captions = embedded(clip, tokenizer, prompts)
    few = diffusion.evenly(SHOWN_STEPS)

    def draw(scale, clip_scale):
        denoiser_for = partial(guided, guidance_scale=scale)
        denoiser_of = denoiser_of_prompts(network, tokenizer, prompts, denoiser_for)

        def sampler(indices, x_T, generator):  # in the place of the denoiser come the samples' numbers
            guide = guide_mean(clip_gradient(clip, captions[indices], clip_scale))
            settings = {"guide": guide} if clip_scale else {}
            return SAMPLERS["ddpm"](few, denoiser_of(indices), x_T, generator, **settings)

        shape = captioned_mnist.IMAGE_SHAPE
        return sample_batches(sampler, lambda indices: indices, shape, len(prompts), config)

    def measure(scale, clip_scale):
        return quality(draw(scale, clip_scale), experiment.reference, digits, colours)

    for clip_scale in CLIP_SCALES:
        row = experiment.row(measure, 1, clip_scale, guidance="CLIP", scale=clip_scale)
        lines.setdefault("CLIP", []).append((row["diversity"], row["fid"]))
    for scale in (1, 1.5, 2, 3, 4):
        row = experiment.row(measure, scale, 0, guidance="classifier-free", scale=scale)
        lines.setdefault("classifier-free", []).append((row["diversity"], row["fid"]))
    experiment.save(curves(lines, "diversity", "FID"))


EXPERIMENTS = {f.__name__: f for f in (errata, upsampling, inpainting, retrieval, clip_guidance)}

if __name__ == "__main__":
    run_command(lambda config: run_experiment(EXPERIMENTS, config), Config)
