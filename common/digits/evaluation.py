"""How good are samples of digits? Every number comes with its n and with the value for real images.

Features are those of the digit classifier (common/digits/classifier.py). Coloured images are classified by
their brightest channel, which for a cleanly coloured digit is the gray digit; the colour is read from the
pixels.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import safe_open
from torch import Tensor

from common.digits.captions import COLOURS, PALETTE, held_out_mask
from common.digits.classifier import PRETRAINED, DigitClassifier, load_digit_classifier
from common.digits.mnist import Digits
from common.errors import UserError
from common.images import check_range
from common.metrics import frechet_distance, kid_with_error, mean_and_covariance, within_group_variance

CONFIDENT = 0.9  # class probability above which a sample counts as a clean digit
MAX_HUE_DISTANCE = 0.5  # in RGB, of fully saturated colours; from the palette's blue, cyan is farther away
MIN_ACCURACY = 0.5  # of the classifier on the reference's own labels


class Reference(NamedTuple):
    """Features of real images, which samples are compared with."""

    name: str
    mean: Float[Tensor, "d"]  # of the training images
    covariance: Float[Tensor, "d d"]
    features: Float[Tensor, "m d"]  # of validation images, for the FID floor, KID and diversity
    labels: Int[Tensor, "m"]
    confidence: Float[Tensor, "m"]  # of the classifier, on the validation images


def mnist_reference() -> Reference:
    """Return MNIST's reference from the stored features, for which no data set is needed."""
    with safe_open(PRETRAINED / "mnist_features.safetensors", "pt") as file:
        get = file.get_tensor
        features, labels = get("test_features").float(), get("test_labels").long()
        confidence = get("test_confidence").float()
        return Reference("mnist", get("train_mean"), get("train_covariance"), features, labels, confidence)


def reference_from_digits(
    digits: Digits, classifier: DigitClassifier | None = None, num_validation: int = 2000
) -> Reference:
    """Return a data set's own reference; `num_validation` random images are set apart for validation.

    Raises UserError if the classifier does not fit the data: labels that it has no class for, fewer images
    than it has features, or labels that it does not predict for at least half of the validation images.
    Raises ValueError if the images are not scaled to [-1, 1].
    """
    classifier = classifier or load_digit_classifier()
    check_range(digits.images)
    if digits.labels.max() >= classifier.num_classes:
        raise UserError(
            f"{digits.name} has the label {digits.labels.max().item()}, but the classifier has only "
            f"{classifier.num_classes} classes; pass one that was trained on this data"
        )
    if len(digits) < num_validation + classifier.num_features + 1:
        raise UserError(
            f"{digits.name} has {len(digits)} images; a covariance of {classifier.num_features} features "
            f"needs more than that many besides the {num_validation} for validation"
        )
    features, probabilities = classifier.predict(digits.images)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    train, val = order[:-num_validation], order[-num_validation:]
    confidence, predicted = probabilities[val].max(-1)
    accuracy = (predicted == digits.labels[val]).float().mean().item()
    if accuracy < MIN_ACCURACY:
        raise UserError(
            f"the classifier predicts {accuracy:.0%} of the labels of {digits.name}; it was made for other "
            "data. Pass one that was trained on this data"
        )
    mean, covariance = mean_and_covariance(features[train])
    return Reference(digits.name, mean, covariance, features[val], digits.labels[val], confidence)


def reference_for(digits: Digits, classifier: DigitClassifier | None = None) -> Reference:
    """Return what samples of a model trained on `digits` are compared with. Raises UserError."""
    if digits.name == "mnist" and classifier is None:
        return mnist_reference()
    return reference_from_digits(digits, classifier)


def fid_to_reference(features: Float[Tensor, "n d"], reference: Reference) -> float:
    """Return the FID of features, at least 2, to the reference's training images."""
    return frechet_distance(reference.mean, reference.covariance, *mean_and_covariance(features))


def real_features(reference: Reference, n: int) -> Float[Tensor, "m d"]:
    """Return the features of at most n validation images, evenly spaced."""
    return reference.features[torch.linspace(0, len(reference.features) - 1, n).long().unique()]


def max_channel(images: Float[Tensor, "n c h w"]) -> Float[Tensor, "n 1 h w"]:
    """Return the brightest channel of each pixel, clipped to [-1, 1]."""
    return images.amax(1, keepdim=True).clamp(-1, 1)


def read_colours(images: Float[Tensor, "n 3 h w"]) -> Int[Tensor, "n"]:
    """Return the palette index of each coloured digit on black; -1 where it is none of them.

    Each pixel brighter than half votes for the palette colour nearest to its own at full brightness, if its
    hue is near that colour's, too. A colour needs three quarters of the votes. An image of which more than
    half is bright is no digit on black. The domain is digits that are about as bright and saturated as the
    palette's: a dark one has no votes, and pale and strong tones of a hue count as its colour or as white.
    """
    rgb = (images.clamp(-1, 1) + 1) / 2
    bright = rgb.amax(1)  # [N, H, W]
    full = rgb / bright.clamp(min=1e-3)[:, None]
    palette = torch.tensor(list(PALETTE.values())) / 255
    distance = (full[:, None] - palette[None, :, :, None, None]).square().sum(2)  # [N, colours, H, W]
    nearest = distance.argmin(1)
    hue, palette_hue = fully_saturated(full), fully_saturated(palette[..., None, None])[..., 0, 0]
    hue_distance = (hue - palette_hue[nearest].movedim(-1, 1)).norm(dim=1)
    counted = (hue_distance < MAX_HUE_DISTANCE) | (nearest == COLOURS.index("white"))
    votes = torch.nn.functional.one_hot(nearest, len(palette)) * (counted & (bright > 0.5))[..., None]
    num_bright = (bright > 0.5).sum((1, 2))
    fraction = votes.sum((1, 2)) / num_bright.clamp(min=1)[:, None]
    best, index = fraction.max(1)
    return torch.where((best >= 0.75) & (num_bright <= bright[0].numel() / 2), index, -1)


def fully_saturated(rgb: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Return colours of the same hue with a smallest channel of 0 and a largest of 1; gray becomes black."""
    low, high = rgb.amin(1, keepdim=True), rgb.amax(1, keepdim=True)
    return (rgb - low) / (high - low).clamp(min=1e-3)


def diversity(features: Float[Tensor, "n d"], groups: Int[Tensor, "n"], reference: Reference) -> float:
    """Return the feature variance within a group, relative to that of real images within a class.

    groups: what samples have in common, for instance their caption; groups of one are left out, and the
    result is NaN if there are no others. 1 is as diverse as real images.
    """
    real = within_group_variance(reference.features, reference.labels)
    return within_group_variance(features, groups) / real


def evaluate(
    images: Float[Tensor, "n c 32 32"],
    reference: Reference,
    digits: Int[Tensor, "n"] | None = None,
    colours: Int[Tensor, "n"] | None = None,
    classifier: DigitClassifier | None = None,
) -> dict[str, float | int | str | None]:
    """Measure samples, at least 2, with 1 or 3 channels in [-1, 1].

    digits, colours: what was requested, if anything. Returns n, FID and its floor (real images at the same
    n), KID and its standard error, the fraction classified with p > 0.9, accuracies and diversity; None where
    a number is undefined.
    """
    classifier = classifier or load_digit_classifier()
    images = images.float().cpu()
    features, probabilities = classifier.predict(max_channel(images))
    confidence, predicted = probabilities.max(-1)
    real = real_features(reference, min(len(images), len(reference.features)))
    result: dict[str, float | int | str | None] = {
        "n": len(images),
        "reference": reference.name,
        "fid": fid_to_reference(features, reference),
        "fid_floor": fid_to_reference(real, reference),
        **kid_with_error(reference.features, features)._asdict(),
        "confident": (confidence > CONFIDENT).float().mean().item(),
        "confident_real": (reference.confidence > CONFIDENT).float().mean().item(),
    }
    groups = predicted if digits is None else digits
    if digits is not None:
        result["digit_accuracy"] = (predicted == digits).float().mean().item()
    if digits is not None and colours is not None:
        colour_right = read_colours(images) == colours
        both = (predicted == digits) & colour_right
        result["colour_accuracy"] = colour_right.float().mean().item()
        result["both_accuracy"] = both.float().mean().item()
        result["held_out_both_accuracy"] = both[held_out_mask()[digits, colours]].float().mean().item()
        groups = digits * len(PALETTE) + colours
    result["diversity"] = diversity(features, groups, reference)
    return {name: None if value != value else value for name, value in result.items()}  # JSON has no NaN


def format_metrics(metrics: dict) -> str:
    """Return the numbers of `evaluate` on one line."""
    formats = {int: "{:,}", float: "{:.3g}"}
    return "  ".join(f"{k} {formats[type(v)].format(v)}" for k, v in metrics.items() if type(v) in formats)
