"""Metrics of sampled photos: breeds or kinds as a classifier predicts them, and how many are copies."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor

from common.images import to_pixels, to_tensor
from common.metrics import within_group_variance
from lesson_06_miniglide.networks.upsampler import LOW_RES, area_downsample
from lesson_06_miniglide.scoring.dog_classifier import load_dog_classifier
from lesson_06_miniglide.scoring.kind_classifier import kind_of, load_kind_classifier

Pixels = UInt8[np.ndarray, "_ size size 3"]


def breed_metrics(
    samples: UInt8[np.ndarray, "_ 64 64 3"], captions: Sequence[str]
) -> dict[str, float | None]:
    """Return what the dog classifier predicts for samples of breeds.

    read_as_dog: the fraction classified as some breed. breed_accuracy: the fraction whose most probable breed
    is the caption, among captions that are a breed the classifier knows; None if there are none. How accurate
    it is on real photos is in the metadata of its weights. Raises UserError if these are missing.
    """
    classifier = load_dog_classifier()
    breeds, probabilities = classifier.breeds, classifier.predict(samples)[1]
    known = [i for i, caption in enumerate(captions) if caption in breeds]
    targets = torch.tensor([breeds.index(captions[i]) for i in known])
    correct = probabilities[known, :-1].argmax(-1) == targets
    return {
        "read_as_dog": (probabilities.argmax(-1) < len(breeds)).float().mean().item(),
        "breed_accuracy": correct.float().mean().item() if known else None,
    }


def kind_metrics(
    samples: UInt8[np.ndarray, "_ 64 64 3"],
    captions: Sequence[str],
    photos: UInt8[np.ndarray, "_ 64 64 3"],
    photo_captions: Sequence[str],
) -> dict[str, float]:
    """Return what the kind classifier predicts for samples, next to real photos.

    kind_accuracy: the fraction whose most probable kind is their caption's (kind_accuracy_real: of photos).
    diversity: the feature variance among samples of a kind, relative to that of the photos (1: as diverse).
    Raises UserError if the classifier's weights are missing, ValueError for captions of other kinds.
    """
    classifier = load_kind_classifier()
    measured = []
    for images, texts in ((samples, captions), (photos, photo_captions)):
        features, probabilities = classifier.predict(images)
        kinds = torch.tensor([kind_of(text, classifier.classes) for text in texts])
        accuracy = (probabilities.argmax(-1) == kinds).float().mean().item()
        measured.append((accuracy, within_group_variance(features, kinds)))
    (accuracy, variance), (accuracy_real, variance_real) = measured
    return {
        "kind_accuracy": accuracy,
        "kind_accuracy_real": accuracy_real,
        "diversity": variance / variance_real,
    }


def memorization_rate(samples: Pixels, train_images: Pixels, val_images: Pixels, flip: bool = True) -> float:
    """Return the fraction of samples that are closer to a training image than 99 % of validation images are.

    The distance is Euclidean, between pixels. Real images that were not trained on score about 0.01. flip:
    also compare with mirrored training images, which training with flips shows to the network.
    """
    threshold = nearest_distance(val_images, train_images, flip).quantile(0.01)
    return (nearest_distance(samples, train_images, flip) < threshold).float().mean().item()


def memorization_rates(
    samples: Pixels, train_images: Pixels, val_images: Pixels, flip: bool
) -> dict[str, float]:
    """Return the memorization rate of samples, and that of blurred validation images for comparison."""
    rate = partial(memorization_rate, train_images=train_images, val_images=val_images, flip=flip)
    return {"memorised": rate(samples), "memorised_blurred": rate(blurred(val_images))}


def nearest_distance(images: Pixels, others: Pixels, flip: bool) -> Float[Tensor, "n"]:
    """Return each image's distance to the nearest of `others` and, if `flip`, of their mirror images."""
    flat, best = to_tensor(images).flatten(1), torch.full((len(images),), torch.inf)
    for start in range(0, len(others), 1000):
        part = others[start : start + 1000]
        for candidates in (part, part[:, :, ::-1]) if flip else (part,):
            distances = torch.cdist(flat, to_tensor(candidates).flatten(1))
            best = torch.minimum(best, distances.amin(1))
    return best


def blurred(images: Pixels) -> Pixels:
    """Return images without the detail that 16x16 pixels cannot show."""
    low_res = area_downsample(to_tensor(images), LOW_RES)
    return to_pixels(F.interpolate(low_res, images.shape[1:3], mode="bilinear", align_corners=False))
