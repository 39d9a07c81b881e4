"""One correct answer for each exercise of lesson 6's notebooks; the notebooks fall back on them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn


def area_downsample(images: Tensor, size: int) -> Tensor:
    """Exercise 6.2: return images [N, C, size, size] of the means of the pixels that each pixel covers."""
    n, c, h, w = images.shape
    return images.view(n, c, size, h // size, size, w // size).mean((3, 5))


def shift_alpha_bar(alpha_bar: Tensor, divide_snr_by: float) -> Tensor:
    """Exercise 6.3: return the alpha_bar whose signal-to-noise ratio is divided by a number."""
    snr = alpha_bar / (1 - alpha_bar) / divide_snr_by
    return snr / (1 + snr)


def patchify(images: Tensor, size: int) -> Tensor:
    """Exercise 6.4: return images [N, C, H, W] as [N, C size^2, H / size, W / size]."""
    n, c, h, w = images.shape
    x = images.view(n, c, h // size, size, w // size, size)
    return x.permute(0, 1, 3, 5, 2, 4).reshape(n, c * size**2, h // size, w // size)


def load_batch(folder: Path) -> tuple[Tensor, list[str]]:
    """Exercise 6.1: return the images [N, 3, 64, 64] of a folder in [-1, 1], and their captions."""
    images, captions = [], []
    for path in sorted(folder.glob("*.jpg")):
        pixels = np.array(Image.open(path).convert("RGB").resize((64, 64)))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
        captions.append(path.with_suffix(".txt").read_text(encoding="utf-8").strip())
    return torch.stack(images), captions


def accumulate_gradients(
    network: nn.Module, loss_fn: Callable[..., Tensor], batch: Sequence[Tensor], parts: int
) -> None:
    """Exercise 6.5: compute the gradient of a batch's mean loss in `parts` micro-batches."""
    n = len(batch[0])
    network.zero_grad()
    for micro_batch in zip(*(x.chunk(parts) for x in batch)):
        loss = loss_fn(network, *micro_batch)  # [n of the micro-batch]
        (loss.sum() / n).backward()


def low_res_input(image: Tensor, alpha_bar: float, noise: Tensor) -> Tensor:
    """Exercise 6.7: return the low-resolution image that an upsampler sees in training, with noise."""
    low_res = area_downsample(image, noise.shape[-1])
    return alpha_bar**0.5 * low_res + (1 - alpha_bar) ** 0.5 * noise


def put_known(sampled: Tensor, image: Tensor, keep: Tensor, alpha_bar: float, noise: Tensor) -> Tensor:
    """Exercise 6.10: return x_{t-1} with the known pixels of the image, at its noise level."""
    known = alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * noise
    return keep * known + (1 - keep) * sampled


def repaint_step(
    reverse_step: Callable, known: Callable, forward_step: Callable, x_t: Tensor, repeats: int
) -> Tensor:
    """Exercise 6.11: take a reverse step several times, going back by a forward step in between."""
    for i in range(repeats):
        x_prev = known(reverse_step(x_t))
        if i < repeats - 1:
            x_t = forward_step(x_prev)
    return x_prev


def sdedit_start(image: Tensor, strength: float, alpha_bar: Tensor, noise: Tensor) -> tuple[int, Tensor]:
    """Exercise 6.12: return the timestep where SDEdit starts, and the image with its noise."""
    t = round(strength * len(alpha_bar)) - 1
    return t, alpha_bar[t] ** 0.5 * image + (1 - alpha_bar[t]) ** 0.5 * noise


def clip_loss(images: Tensor, captions: Tensor, scale: float) -> Tensor:
    """Exercise 6.15: return CLIP's loss for vectors [N, D], row i of one belonging to row i of the other."""
    logits = scale * F.normalize(images, dim=1) @ F.normalize(captions, dim=1).T
    correct = torch.arange(len(images))
    return (F.cross_entropy(logits, correct) + F.cross_entropy(logits.T, correct)) / 2
