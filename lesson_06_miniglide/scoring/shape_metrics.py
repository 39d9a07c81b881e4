"""Metrics of sampled shapes, whose captions can be checked exactly (shapes/checker.py)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8

from lesson_06_miniglide.scoring.features import fid_kid, pixels_8x8
from lesson_06_miniglide.shapes.checker import accuracy_by_kind, caption_accuracy
from lesson_06_miniglide.shapes.render import render_captions

Pixels = UInt8[np.ndarray, "_ 64 64 3"]


def caption_metrics(samples: Pixels, captions: Sequence[str], suffix: str = "") -> dict[str, float | None]:
    """Return the fraction of samples that match their captions, and what they get right by kind of caption.

    caption_accuracy: everything that the caption says and nothing else. single_accuracy, count_accuracy,
    pair_accuracy, relation_accuracy: as in `accuracy_by_kind`. suffix: appended to each name.
    """
    metrics = {"caption_accuracy": caption_accuracy(samples, captions), **accuracy_by_kind(samples, captions)}
    return {f"{name}{suffix}": value for name, value in metrics.items()}


def distance_to_renders(
    samples: Pixels, rendered: Pixels, captions: Sequence[str], seed: int
) -> dict[str, float | None]:
    """Return FID and KID of samples to rendered images of the same captions, in pixels of 8x8.

    The floor is the FID of `rendered` to a second set of rendered images, drawn with `seed`.
    """
    return fid_kid(samples, rendered, pixels_8x8, more_real=render_captions(captions, seed))
