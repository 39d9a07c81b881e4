"""The evaluation classifier of photos: it tells which breed an image shows, or that it shows no dog.

    python -m lesson_06_miniglide.scoring.dog_classifier --dogs-dir DOGS --others-dir OTHERS --test-dir TEST

trains it on the photos of DOGS (one class per breed) and of OTHERS (one class, "no dog"), measures it on TEST
and on a tenth of OTHERS that it is not trained on, and writes pretrained/dog_classifier.safetensors. Its
classes and features measure every model of photos in this lesson (evaluate.py); training it again changes
those numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from common.cli import PositiveInt, Seed, run_command
from common.digits.classifier import fit, load_frozen
from common.errors import UserError
from common.images import to_tensor
from common.training.checkpoints import pretrained_path
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.scoring.photo_classifier import (
    PhotoClassifier,
    Pixels,
    augment,
    read_weights,
    write_weights,
)

WEIGHTS = pretrained_path(LESSON, "dog_classifier")
COMMAND = "python -m lesson_06_miniglide.scoring.dog_classifier"
TEST_EVERY = 10  # every tenth of the other photos is for testing


class DogClassifier(PhotoClassifier):
    """A classifier of breeds whose last class is "no dog"."""

    def __init__(self, breeds: Sequence[str]):
        super().__init__([*breeds, "no dog"])
        self.breeds = list(breeds)


@cache
def load_dog_classifier() -> DogClassifier:
    """Return the pretrained evaluation classifier, frozen. Raises UserError if it has not been trained."""
    weights, metadata = read_weights(WEIGHTS, COMMAND)
    return load_frozen(DogClassifier(metadata["breeds"]), weights)


@dataclass(frozen=True)
class Config:
    """Train the evaluation classifier of photos."""

    dogs_dir: str  # photos of dogs, Images/<wnid>-<Breed>/*.jpg
    others_dir: str  # other photos with captions; those whose caption names one of the breeds are left out
    test_dir: str  # more photos of the same breeds
    cache_dir: str | None = None  # folder for the decoded images; default .cache in each data folder
    epochs: PositiveInt = 40  # passes over the training photos
    batch_size: PositiveInt = 128  # images per step
    seed: Seed = 0  # of weights, order and augmentation


def load_dogs(
    folder: str, cache_dir: str | None, breeds: Sequence[str] | None = None
) -> tuple[Pixels, Int[Tensor, "n"], list[str]]:
    """Return photos, the index of each photo's breed, and the breeds (sorted, if they are not given).

    Raises UserError if there are photos of other breeds than the given ones.
    """
    images, loaded = load_cache(folder, dogs=True, cache_dir=cache_dir)
    captions = [str(caption) for caption in loaded]  # a dog has one
    breeds = list(breeds or sorted(set(captions)))
    if unknown := set(captions) - set(breeds):
        raise UserError(f"--test-dir holds {', '.join(sorted(unknown))}, which --dogs-dir does not")
    return images, torch.tensor([breeds.index(caption) for caption in captions]), breeds


def main(config: Config) -> None:
    torch.manual_seed(config.seed)
    dogs, labels, breeds = load_dogs(config.dogs_dir, config.cache_dir)
    test_dogs, test_labels, _ = load_dogs(config.test_dir, config.cache_dir, breeds)
    others, captions = load_cache(config.others_dir, cache_dir=config.cache_dir)
    others = others[[not any(breed.lower() in str(c).lower() for breed in breeds) for c in captions]]
    is_test = np.arange(len(others)) % TEST_EVERY == 0
    images, test_others = np.concatenate([dogs, others[~is_test]]), others[is_test]
    num_others = len(images) - len(dogs)
    labels = torch.cat([labels, torch.full((num_others,), len(breeds))])
    class_weight = torch.ones(len(breeds) + 1)
    class_weight[-1] = len(dogs) / num_others / len(breeds)  # all others weigh as much as one breed

    images_at = lambda batch: augment(to_tensor(images[batch.numpy()]))  # noqa: E731
    classifier = fit(DogClassifier(breeds), images_at, labels, config, class_weight, max_lr=4e-3)

    probabilities, other_probabilities = classifier.predict(test_dogs)[1], classifier.predict(test_others)[1]
    measured = {
        "breeds": breeds,
        "test_breed_accuracy": (probabilities[:, :-1].argmax(-1) == test_labels).float().mean().item(),
        "test_dogs_read_as_dogs": (probabilities.argmax(-1) < len(breeds)).float().mean().item(),
        "test_others_read_as_dogs": (other_probabilities.argmax(-1) < len(breeds)).float().mean().item(),
        "test_dogs": len(test_dogs),
        "test_others": len(test_others),
        "epochs": config.epochs,
    }
    print(measured)
    write_weights(WEIGHTS, classifier, measured)


if __name__ == "__main__":
    run_command(main, Config)
