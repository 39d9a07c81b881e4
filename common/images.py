"""Conversions between network images (float in [-1, 1]) and files (uint8 in [0, 255])."""

import numpy as np
import torch
from jaxtyping import Float, Num, UInt8
from torch import Tensor


def to_float(images: UInt8[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Map uint8 in [0, 255] to float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images: Float[Tensor, "*shape"]) -> UInt8[Tensor, "*shape"]:
    """Map float in [-1, 1] to uint8 in [0, 255]; values outside are clipped."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()


def to_pixels(images: Float[Tensor, "n c h w"]) -> UInt8[np.ndarray, "n h w c"]:
    """Map float [N, C, H, W] in [-1, 1] to the layout of files and numpy, uint8 [N, H, W, C]."""
    return to_uint8(images).cpu().permute(0, 2, 3, 1).numpy()


def to_tensor(images: UInt8[np.ndarray, "n h w c"]) -> Float[Tensor, "n c h w"]:
    """Map uint8 [N, H, W, C] to float [N, C, H, W] in [-1, 1]; the inverse of `to_pixels`."""
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    return to_float(pixels).permute(0, 3, 1, 2).contiguous()


def check_range(x_0: Num[Tensor, "n ..."]) -> None:
    """Refuse a batch of images that is plainly in [0, 1] or [0, 255]; noise schedules assume [-1, 1].

    Raises ValueError if a value lies outside [-1.01, 1.01], or if the darkest pixel of a batch of several
    images lies between 0 and 0.1 (black in [0, 1]). Very bright batches in [-1, 1] are accepted.
    """
    low, high = x_0.min().item(), x_0.max().item()
    if high > 1.01 or low < -1.01 or (0 <= low < 0.1 and len(x_0) > 1):
        span = f"x_0 runs from {low:.2f} to {high:.2f}"
        raise ValueError(f"{span}; images must be scaled to [-1, 1] (common.images.to_float)")
