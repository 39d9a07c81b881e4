"""Studies of upsampling and inpainting, on shapes. Run by experiments.py."""

import random
import time
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.metrics import fid_between
from common.plotting import plot_curves
from common.results.experiments import (
    ExperimentConfig,
    open_table,
    save_figure,
    save_image_rows,
    with_default_steps,
)
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_06_miniglide.editing.inpaint_inputs import InpaintInputs
from lesson_06_miniglide.networks.inpainting import random_mask
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.networks.upsampler import LOW_RES, area_downsample, noise_augment
from lesson_06_miniglide.pipeline import MiniGlidePipeline
from lesson_06_miniglide.studies.captioned_shapes import (
    SAMPLING_STEPS,
    load_shapes,
    measure_captions,
    train_preset,
)

NOISE_LEVELS = (0, 50, 100, 200, 400)
NUM_RESAMPLES = (1, 5)  # of RePaint
BICUBIC, AUGMENTED, NOT_AUGMENTED = "bicubic", "trained with noise", "trained without noise"
COLUMN_TITLES = {
    "upsampler": "upsampler",
    "source": "16x16 images",
    "noise_level": "noise level",
    "psnr": "PSNR, dB",
    "patch_fid": "FID of patches",
    "method": "method",
    "seam": ("seam", ".3f"),
    "seconds_per_sample": "seconds per sample",
}

# -- upsampling


def task_without_noise(
    diffusion: GaussianDiffusion, network: nn.Module, x_0: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """Draw x_0, given its low-resolution version without noise: no noise conditioning augmentation."""
    noise_level = torch.zeros(len(x_0), dtype=torch.int64)
    return x_0, noise_augment(diffusion, area_downsample(x_0, LOW_RES), noise_level)


def patches(images: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "m 192"]:
    """Return 16 patches of 8x8 pixels per image, which show what edges look like."""
    return F.unfold(images.clamp(-1, 1), 8, stride=16).transpose(1, 2).flatten(0, 1)


def psnr(images: Float[Tensor, "n 3 h w"], real: Float[Tensor, "n 3 h w"]) -> float:
    """Return the peak signal-to-noise ratio in decibels; the peak is 2, from -1 to 1."""
    return (10 * (4 / (images.clamp(-1, 1) - real).square().mean()).log10()).item()


def upsampling(config: ExperimentConfig) -> None:
    """Compare upsamplers on real low-resolution images and on samples (Ho et al. 2022, section 4).

    Noise conditioning costs sharpness on real images. It is there for the samples of another network.
    """
    config = with_default_steps(config)
    table, shapes = open_table(LESSON, config), load_shapes(config)
    base = train_preset(config, shapes, "small", "tiny_small")
    upsamplers: dict[str, Any] = {
        AUGMENTED: train_preset(config, shapes, "noise", "tiny_upsampler"),
        NOT_AUGMENTED: train_preset(config, shapes, "no noise", "tiny_upsampler", task=task_without_noise),
    }
    captions, real = shapes.captions, shapes.real
    samples = base(captions, 3, seed=config.seed, progress_bar=False).tensor
    sources = {"real": area_downsample(real, LOW_RES), "samples": samples}
    curves: dict[str, list[tuple[float, float]]] = {}

    def enlarge(name: str, source: str, noise_level: int, n: int | None = None) -> Tensor:
        """Enlarge the first n images of a source; None means all."""
        low_res = sources[source][:n]
        if name == BICUBIC:
            return F.interpolate(low_res, real.shape[2:], mode="bicubic", antialias=False)
        return upsamplers[name].super_resolve(low_res, captions[:n], noise_level, seed=config.seed)

    def measure(name: str, source: str, noise_level: int) -> dict[str, Any]:
        images = enlarge(name, source, noise_level)
        similarity = psnr(images, real) if source == "real" else None
        distance = fid_between(patches(real), patches(images))
        return {"psnr": similarity, "patch_fid": distance} | measure_captions(images, captions)

    for source in sources:
        for name in (BICUBIC, *upsamplers):
            for level in NOISE_LEVELS if name == AUGMENTED else (0,):
                measure_row = partial(measure, name, source, level)
                row = table.row(measure_row, upsampler=name, source=source, noise_level=level)
                if name in upsamplers:
                    curves.setdefault(f"{name}, {source}", []).append((level + 10, row["patch_fid"]))
    figure_rows = {"samples, 16x16": F.interpolate(samples[:8], real.shape[2:])}
    figure_rows |= {name: enlarge(name, "samples", 0, 8) for name in (BICUBIC, *upsamplers)}
    figure_rows |= {f"noise level {n}": enlarge(AUGMENTED, "samples", n, 8) for n in NOISE_LEVELS[1:]}
    save_image_rows(table, figure_rows)
    save_figure(table, plot_curves(curves, "noise level + 10", "FID of patches"), "_curve")


# -- inpainting


def seam(images: Float[Tensor, "n 3 h w"], keep_mask: Float[Tensor, "n 1 h w"]) -> float:
    """Return the mean difference between neighbouring pixels of which one is known and one is not.

    keep_mask: 1 where the pixel is known.
    """
    differences = []
    for axis in (2, 3):
        n = images.shape[axis] - 1
        edge = keep_mask.narrow(axis, 0, n) != keep_mask.narrow(axis, 1, n)
        step = (images.narrow(axis, 0, n) - images.narrow(axis, 1, n)).abs()
        differences.append(step.mean(1, keepdim=True)[edge])
    return torch.cat(differences).mean().item()


def random_masks(n: int, seed: int = 0) -> Float[Tensor, "{n} 1 64 64"]:
    """Return masks, 1 where known. Something is known in each of them."""
    rng = random.Random(seed)
    masks: list[np.ndarray] = []
    while len(masks) < n:
        mask = random_mask(64, rng)
        if mask.any():
            masks.append(mask)
    return torch.from_numpy(np.stack(masks)).float()[:, None]


def inpainting(config: ExperimentConfig) -> None:
    """Compare a network trained to inpaint with RePaint, which needs no training.

    The former is section 4.3 of Nichol et al. 2022, the latter Lugmayr et al. 2022.
    """
    config = with_default_steps(config)
    table, base = open_table(LESSON, config, LESSON), MiniGlidePipeline.from_pretrained(None, config.device)
    shapes = load_shapes(config, base.tokenizer)
    trained = train_preset(config, shapes, "inpainting", "tiny_inpainting", init_from=base)
    captions, real, keep_mask = shapes.captions, shapes.real, random_masks(config.num_samples)

    def inpaint(pipe: MiniGlidePipeline, num_resamples: int, n: int | None = None) -> Tensor:
        """Fill the first n masked regions; None means all. A mask belongs to its sample, so in batches."""
        parts = []
        for indices in torch.arange(len(captions[:n])).split(250):
            prompts = [captions[i] for i in indices.tolist()]
            inputs = InpaintInputs(real[indices], keep_mask[indices])
            unet_kwargs: Any
            sampler, unet_kwargs = inputs.make_sampler(
                pipe.network, SAMPLERS["ddpm"], len(indices), num_resamples
            )
            output = pipe(
                prompts, 3, SAMPLING_STEPS, sampler, seed=config.seed, progress_bar=False, **unet_kwargs
            )
            parts.append(output.tensor)
        return torch.cat(parts)

    def measure(pipe: MiniGlidePipeline | None = None, num_resamples: int = 1) -> dict[str, Any]:
        started = time.monotonic()
        images = inpaint(pipe, num_resamples) if pipe else real
        seconds = (time.monotonic() - started) / len(images)
        row = {"seam": seam(images, keep_mask), "seconds_per_sample": seconds}
        return row | measure_captions(images, captions)

    table.row(measure, method="real images")
    methods = {"trained to inpaint": (trained, 1)}
    methods |= {f"RePaint, each step {n}x": (base, n) for n in NUM_RESAMPLES}
    for name, method in methods.items():
        table.row(partial(measure, *method), method=name)
    figure_rows = {"known": (real * keep_mask)[:8], "real": real[:8]}
    save_image_rows(table, figure_rows | {name: inpaint(*method, 8) for name, method in methods.items()})
