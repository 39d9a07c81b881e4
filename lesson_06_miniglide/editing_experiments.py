"""Experiments on enlarging and filling holes, on drawn shapes. Run by experiments.py."""

import random
import time

import numpy as np
import torch
import torch.nn.functional as F

from common.evaluation import fid_between
from common.pictures import curves
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_06_miniglide.generate import LESSON, Generator
from lesson_06_miniglide.inpainting import Repainting, random_mask
from lesson_06_miniglide.shapes_experiments import Shapes
from lesson_06_miniglide.upsampler import LOW_RES, enlarge, noised, shrink

SHOWN_STEPS = 50  # of filling holes, ancestral
LEVELS = (0, 50, 100, 200, 400)  # of the noise that an upsampler sees its small picture in
TIMES = (1, 5)  # each step is taken, by a network that was not trained to repaint

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
    """Nichol et al. 2022, section 4.3, and Lugmayr et al. 2022: trained to repaint, or made to."""
    experiment, base = Shapes(config, weights_of=LESSON), Generator.load(None, config.device)
    trained = experiment.generator("inpainting", "tiny_inpainting", start_from=base)
    captions, real, known = experiment.captions, experiment.real, holes(config.num_samples)

    def repainted(generator, times, n=None):
        """The first n holes filled, or all; batches of 250, for a hole belongs to its sample."""
        parts = []
        for i in torch.arange(len(captions[:n])).split(250):
            hole, prompts = Repainting(real[i], known[i]), [captions[j] for j in i.tolist()]
            sampler, seen = hole.drawn_by(generator.network, SAMPLERS["ddpm"], len(i), times)
            parts.append(generator.draw(prompts, 3, config, SHOWN_STEPS, sampler, **seen))
        return torch.cat(parts)

    def measure(*way):
        started = time.monotonic()
        images = repainted(*way) if way else real
        return {
            "n": len(images),
            "all_right": experiment.all_right(images),
            "jump_at_the_edge": jump(images, known),
            "seconds_a_sample": (time.monotonic() - started) / len(images),
        }

    experiment.row(measure, way="real")
    ways = {"trained": (trained, 1)} | {f"untrained, {times} times": (base, times) for times in TIMES}
    for name, way in ways.items():
        experiment.row(measure, *way, way=name)
    shown = {"the hole": (real * known)[:8], "real": real[:8]}
    experiment.save_rows(shown | {name: repainted(*way, 8) for name, way in ways.items()})
