"""The evaluation classifier of the miniGLIDE photos: it tells the kinds of things apart that captions name.

    python -m lesson_06_miniglide.scoring.kind_classifier --data-dir SBU_MINI

trains it on the nine tenths of the photos that train.py --validation-fraction 0.1 trains on, measures it on
the others, and writes pretrained/kind_classifier.safetensors. Its features measure every model of these
photos (evaluate.py --kinds); training it again changes those numbers.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Int
from torch import Tensor

from common.cli import PositiveInt, Seed, run_command
from common.digits.classifier import fit, load_frozen
from common.images import to_tensor
from common.training.checkpoints import pretrained_path
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.image_data.captioned_images import CaptionedImages, captioned_images
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.scoring.photo_classifier import PhotoClassifier, augment, read_weights, write_weights

WEIGHTS = pretrained_path(LESSON, "kind_classifier")
COMMAND = "python -m lesson_06_miniglide.scoring.kind_classifier"
HELD_OUT = 0.1  # fraction of the photos that neither classifier nor model is trained on


def kinds_in(captions: Iterable[str]) -> list[str]:
    """Return the kinds that captions name, sorted: the captions that do not end with a shorter one.

    "a lemon" is a kind; "a photo of a lemon" is a caption of it.
    """
    distinct = set(captions)
    return sorted(c for c in distinct if not any(c != other and c.endswith(other) for other in distinct))


def kind_of(caption: str, kinds: list[str]) -> int:
    """Return which of the kinds a caption ends with. Raises ValueError if it is none of them."""
    for i, kind in enumerate(kinds):
        if caption.endswith(kind):
            return i
    raise ValueError(f"{caption!r} names none of the kinds {', '.join(kinds)}")


def load_photos(data_dir: str, cache_dir: str | None = None) -> tuple[CaptionedImages, CaptionedImages]:
    """Return the photos to train on, and those held out, as train.py --validation-fraction 0.1 does."""
    images, captions = load_cache(data_dir, cache_dir=cache_dir)
    return captioned_images("photos", images, captions, flip=True).split(HELD_OUT)


def labels_of(photos: CaptionedImages, kinds: list[str]) -> Int[Tensor, "n"]:
    """Return the kind of each photo."""
    captions = photos.captions_for(torch.arange(len(photos)))
    return torch.tensor([kind_of(caption, kinds) for caption in captions])


@cache
def load_kind_classifier() -> PhotoClassifier:
    """Return the pretrained evaluation classifier, frozen. Raises UserError if it has not been trained."""
    weights, metadata = read_weights(WEIGHTS, COMMAND)
    return load_frozen(PhotoClassifier(metadata["kinds"]), weights)


@dataclass(frozen=True)
class Config:
    """Train the evaluation classifier of the miniGLIDE photos."""

    data_dir: str  # photos whose captions end with the kind of thing that they show
    cache_dir: str | None = None  # folder for the decoded images; default .cache in the data folder
    epochs: PositiveInt = 25  # passes over the training photos
    batch_size: PositiveInt = 128  # images per step
    seed: Seed = 0  # of weights, order and augmentation


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    photos, held_out = load_photos(config.data_dir, config.cache_dir)
    kinds = kinds_in(photos.captions)
    pixels = photos.images[photos.indices.numpy()]
    images_at = lambda batch: augment(to_tensor(pixels[batch.numpy()]))  # noqa: E731
    classifier = fit(PhotoClassifier(kinds), images_at, labels_of(photos, kinds), config, max_lr=4e-3)
    predicted = classifier.predict(held_out.images[held_out.indices.numpy()])[1].argmax(-1)
    measured = {
        "kinds": kinds,
        "test_accuracy": (predicted == labels_of(held_out, kinds)).float().mean().item(),
        "test_photos": len(held_out),
        "epochs": config.epochs,
    }
    print(measured)
    write_weights(WEIGHTS, classifier, measured)


if __name__ == "__main__":
    run_command(main, Config)
