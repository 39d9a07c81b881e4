"""Features of 64x64 images, and the FID and KID of two sets of images in such features."""

import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from common.errors import UserError
from common.images import to_tensor
from common.metrics import fid_between, kid_with_error
from lesson_06_miniglide.networks.upsampler import area_downsample
from lesson_06_miniglide.scoring.dog_classifier import load_dog_classifier
from lesson_06_miniglide.scoring.kind_classifier import load_kind_classifier

Pixels = UInt8[np.ndarray, "_ 64 64 3"]
FeatureExtractor: TypeAlias = Callable[[np.ndarray], Tensor]  # uint8 images [N, 64, 64, 3] -> features [N, D]


def load_inception() -> FeatureExtractor:
    """Return the extractor of the 2048 Inception features that papers report FID in.

    Raises UserError if torch-fidelity is missing or its weights cannot be downloaded.
    """
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--features inception is not available ({reason}); pip install torch-fidelity and allow its "
            "download of 91 MB, or use --features classifier"
        ) from None

    def extract(images: np.ndarray) -> Tensor:
        batches = np.array_split(images, -(-len(images) // 50))
        return torch.cat([network(torch.from_numpy(b).permute(0, 3, 1, 2)).float() for b in batches])

    return extract


def load_classifier_features() -> FeatureExtractor:
    """Return the extractor of the dog classifier's 128 features. Raises UserError if it is missing."""
    classifier = load_dog_classifier()
    return lambda images: classifier.predict(images)[0]


def load_kind_features() -> FeatureExtractor:
    """Return the extractor of the kind classifier's 128 features. Raises UserError if it is missing."""
    classifier = load_kind_classifier()
    return lambda images: classifier.predict(images)[0]


def pixels_8x8(images: Pixels) -> Float[Tensor, "n 192"]:
    """Return the colours of images downsampled to 8x8: which colour is where, as features of shapes."""
    return area_downsample(to_tensor(images), 8).flatten(1)


# The choices of --features: name -> function that loads the extractor
EXTRACTORS: dict[str, Callable[[], FeatureExtractor]] = {
    "inception": load_inception,
    "classifier": load_classifier_features,
    "kinds": load_kind_features,
}


def fid_kid(
    samples: Pixels, real: Pixels, extract: FeatureExtractor, more_real: Pixels | None = None
) -> dict[str, float | None]:
    """Return FID and KID of samples to real images, and the FID of real images to real ones as its floor.

    more_real: other real images, which the floor compares `real` with; without them, it compares one random
    half of `real` with the other. Each set needs at least 2 images, and `real` 4 if it is halved. kid_error:
    the standard error of KID, None for fewer than 4 images.
    """
    sample_features, real_features = extract(samples), extract(real)
    if more_real is None:
        order = torch.randperm(len(real_features), generator=torch.Generator().manual_seed(0))
        first, second = real_features[order].chunk(2)
    else:
        first, second = real_features, extract(more_real)
    kid, kid_error = kid_with_error(real_features, sample_features)
    return {
        "fid": fid_between(real_features, sample_features),
        "fid_floor": fid_between(first, second),
        "kid": kid,
        "kid_error": None if math.isnan(kid_error) else kid_error,
    }
