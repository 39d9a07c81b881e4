"""How good are the samples? Every number comes with its n and with what real images get at that n.

All features are those of the shipped judge (common.classifier). Coloured images are judged by their brightest
channel, which for a cleanly coloured digit is the gray digit; the colour is measured apart, from the pixels.
"""

import warnings
from typing import NamedTuple

import torch
from safetensors import safe_open
from torch import nn

from common.captions import PALETTE, held_out_mask
from common.classifier import NUM_FEATURES, PRETRAINED, judge
from common.pictures import label_grid


class Reference(NamedTuple):
    """Real images as the judge sees them."""

    name: str
    num: int  # images behind mean and covariance: the training set
    mean: torch.Tensor  # [64]
    covariance: torch.Tensor  # [64, 64]
    features: torch.Tensor  # [M, 64] of other real images, for the floor, KID and the diversity
    labels: torch.Tensor  # [M]
    confidence: torch.Tensor  # [M]


def mnist_reference():
    """MNIST from the shipped features: no data set is needed."""
    with safe_open(PRETRAINED / "mnist_features.safetensors", "pt") as file:
        get, num = file.get_tensor, int(file.metadata()["num_train"])
        features, labels = get("test_features").float(), get("test_labels").long()
        confidence = get("test_confidence").float()
        mean, covariance = get("train_mean"), get("train_covariance")
        return Reference("mnist", num, mean, covariance, features, labels, confidence)


def reference_of(digits, held_back=2000):
    """The reference of a data set (common.data.Digits) itself; `held_back` images by chance are the others.

    By chance, since drawn digits come in turns: every second one of them would be an even digit.
    """
    features, probabilities = judge().read(digits.images)
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    seen, other = features[order[:-held_back]].double(), order[-held_back:]
    confidence = probabilities[other].amax(-1)
    mean, covariance = seen.mean(0), seen.T.cov()
    return Reference(
        digits.name, len(seen), mean, covariance, features[other], digits.labels[other], confidence
    )


def reference_for(digits):
    """What samples of a model trained on `digits` are compared with."""
    return mnist_reference() if digits.name == "mnist" else reference_of(digits)


def as_features(width=NUM_FEATURES):
    """A feature extractor for torchmetrics that is handed features."""
    extractor = nn.Identity()
    extractor.num_features = width
    return extractor


def fid_metric(width=NUM_FEATURES):
    from torchmetrics.image.fid import FrechetInceptionDistance  # here, since loading it takes seconds

    return FrechetInceptionDistance(feature=as_features(width))


def fid_between(real, fake):
    """Fréchet distance of two sets of features [N >= 2, width]."""
    metric = fid_metric(real.shape[1])
    metric.update(real.double(), real=True)
    metric.update(fake.double(), real=False)
    return metric.compute().item()


def fid(features, reference):
    """Fréchet distance (Heusel et al. 2017) of features [N >= 2, 64] to the reference's training images."""
    metric = fid_metric()
    metric.real_features_num_samples += reference.num
    metric.real_features_sum += reference.mean * reference.num
    outer = reference.num * torch.outer(reference.mean, reference.mean)
    metric.real_features_cov_sum += reference.covariance * (reference.num - 1) + outer
    metric.update(features.double(), real=False)
    return metric.compute().item()


def kid(features, reference):
    return kid_between(reference.features, features)


def kid_between(real, fake):
    """Kernel distance (Bińkowski et al. 2018), unbiased: mean over subsets, may fall below 0."""
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(1000, len(fake), len(real))
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        metric = KernelInceptionDistance(feature=as_features(real.shape[1]), subsets=20, subset_size=size)
        metric.update(real, real=True)
        metric.update(fake, real=False)
        return metric.compute()[0].item()


def real_sample(reference, n):
    """n features of real images, spread over the reference's other images."""
    return reference.features[torch.linspace(0, len(reference.features) - 1, n).long().unique()]


def diversity(features, groups, reference):
    """Feature variance within a group (a caption's samples), as a share of real digits' variance within a
    class.

    groups: [N]; groups of one sample say nothing and are left out. NaN if all are. 1 is as varied as real.
    """
    real = torch.stack([reference.features[reference.labels == d].var(0).sum() for d in range(10)]).mean()
    spread = [features[groups == g].var(0).sum() for g in groups.unique() if (groups == g).sum() > 1]
    return (torch.stack(spread).mean() / real).item() if spread else float("nan")


def brightness(images):
    """[N, 1 or 3, H, W] in [-1, 1] -> the brightest channel [N, 1, H, W]."""
    return images.amax(1, keepdim=True).clamp(-1, 1)


def read_colours(images):
    """The palette index of each RGB image [N, 3, H, W] in [-1, 1], from its pixels; -1 where it has no one
    colour.

    Each pixel brighter than half votes for the palette colour nearest to its own at full brightness. A colour
    is read where it has three quarters of the votes.
    """
    rgb = (images.clamp(-1, 1) + 1) / 2
    bright = rgb.amax(1)  # [N, H, W]
    full = rgb / bright.clamp(min=1e-3)[:, None]
    palette = torch.tensor(list(PALETTE.values())) / 255
    distance = (full[:, None] - palette[None, :, :, None, None]).square().sum(2)  # [N, colours, H, W]
    votes = torch.nn.functional.one_hot(distance.argmin(1), len(palette)) * (bright > 0.5)[..., None]
    share = votes.sum((1, 2)) / votes.sum((1, 2, 3)).clamp(min=1)[:, None]
    best, index = share.max(1)
    return torch.where(best >= 0.75, index, -1)


def evaluate(images, reference, digits=None, colours=None):
    """All numbers for samples [N >= 2, 1 or 3, 32, 32] in [-1, 1]; None where a number cannot be had.

    digits, colours: what was asked for, [N] each, if anything was.
    """
    images = images.float().cpu()
    features, probabilities = judge().read(brightness(images))
    confidence, read = probabilities.max(-1)
    real = real_sample(reference, min(len(images), len(reference.features)))
    result = {
        "n": len(images),
        "reference": reference.name,
        "fid": fid(features, reference),
        "fid_floor": fid(real, reference),
        "kid": kid(features, reference),
        "confident": (confidence > 0.9).float().mean().item(),
        "confident_real": (reference.confidence > 0.9).float().mean().item(),
    }
    groups = read if digits is None else digits
    if digits is not None:
        result["digit_accuracy"] = (read == digits).float().mean().item()
    if colours is not None:
        colour_right = read_colours(images) == colours
        both = (read == digits) & colour_right
        result["colour_accuracy"] = colour_right.float().mean().item()
        result["both_accuracy"] = both.float().mean().item()
        result["held_out_both_accuracy"] = both[held_out_mask()[digits, colours]].float().mean().item()
        groups = digits * len(PALETTE) + colours
    result["diversity"] = diversity(features, groups, reference)
    return {name: None if value != value else value for name, value in result.items()}  # NaN is no JSON


def report(run, samples, reference, picture, digits=None, colours=None, numbers=None, **labels):
    """End a run: its samples measured, `numbers` measured otherwise, and a grid of the images `picture`."""
    measured = evaluate(samples, reference, digits, colours) | (numbers or {})

    print(in_words(measured))
    run.finish(measured, "samples.png", label_grid(picture, **labels))


def in_words(measured):
    forms = {int: "{:,}", float: "{:.3g}"}
    return "  ".join(f"{k} {forms[type(v)].format(v)}" for k, v in measured.items() if type(v) in forms)
