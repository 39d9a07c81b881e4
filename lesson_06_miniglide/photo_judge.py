"""The judge of photos: a small classifier that tells which breed a picture shows, or that it shows no dog.

    python lesson_06_miniglide/photo_judge.py --dogs-dir DOGS --others-dir OTHERS --test-dir TEST

trains it on the photos of DOGS (a class a breed) and of OTHERS (one class, "no dog"), measures it on TEST and
on photos of OTHERS that are held back, and writes pretrained/photo_judge.safetensors. It measures every
generator of photos in this lesson: breed, dog or not, and FID and KID in its features.
"""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from common.classifier import block, fit, halved, ready
from common.command import UserError, run_command
from common.runs import make_folder, write_atomically
from lesson_06_miniglide.cache import load_cache
from lesson_06_miniglide.captioned_images import as_batch

WEIGHTS = Path(__file__).parent / "pretrained" / "photo_judge.safetensors"
NUM_FEATURES = 128
HELD_BACK = 10  # every tenth of the others


class PhotoJudge(nn.Module):
    """float [N, 3, 64, 64] in [-1, 1] -> features [N, 128] -> logits [N, classes]; the last is "no dog"."""

    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(
            block(3, 32), block(32, 48, 2), block(48, 64), block(64, 96, 2), block(96, 96), block(96, 128, 2),
            block(128, 160), block(160, 192, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(192, NUM_FEATURES),
        )  # fmt: skip
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Linear(NUM_FEATURES, classes))

    def forward(self, images):
        return self.head(self.body(images))

    @torch.inference_mode()
    def read(self, images, batch_size=500):
        """Features [N, 128] and class probabilities of uint8 images [N, 64, 64, 3]."""
        starts = range(0, len(images), batch_size)
        features = torch.cat([self.body(as_batch(images[i : i + batch_size])) for i in starts])
        return features, self.head(features).softmax(-1)


@cache
def photo_judge():
    """(the trained judge, the breeds it knows). Raises UserError if it has not been trained."""
    if not WEIGHTS.exists():
        raise UserError(f"{WEIGHTS} is not there; train it: python lesson_06_miniglide/photo_judge.py --help")
    with safe_open(WEIGHTS, "pt") as file:
        breeds = json.loads(file.metadata()["breeds"])
        weights = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
    return ready(PhotoJudge(len(breeds) + 1), weights), breeds


def augmented(x):
    """Mirror, shift, scale and re-colour each image a little."""
    n = len(x)
    scale = 1 - 0.3 * torch.rand(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(n) < 0.5, -1, 1), scale
    theta[:, :, 2] = (2 * torch.rand(n, 2) - 1) * (1 - scale)[:, None]
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    contrast, colour = 1 + 0.2 * torch.randn(n, 1, 1, 1), 0.1 * torch.randn(n, 3, 1, 1)
    return x * contrast + colour


@dataclass(frozen=True)
class Config:
    """Train the judge of photos."""

    dogs_dir: str  # photos of dogs, Images/<wnid>-<Breed>/*.jpg
    others_dir: str  # other photos with captions; those whose caption names one of the breeds are left out
    test_dir: str  # more photos of the same breeds
    cache_dir: str | None = None  # where the decoded images go; default .cache in each folder
    epochs: int = 40
    batch_size: int = 128
    seed: int = 0


def main(config):
    torch.manual_seed(config.seed)
    dogs, captions = load_cache(config.dogs_dir, dogs=True, cache_dir=config.cache_dir)
    breeds = sorted(set(captions))
    labels = torch.tensor([breeds.index(caption) for caption in captions])
    test, test_captions = load_cache(config.test_dir, dogs=True, cache_dir=config.cache_dir)
    if unknown := set(test_captions) - set(breeds):
        raise UserError(f"--test-dir holds {', '.join(sorted(unknown))}, which --dogs-dir does not")
    breed = torch.tensor([breeds.index(caption) for caption in test_captions])
    others, other_captions = load_cache(config.others_dir, cache_dir=config.cache_dir)
    no_dog = [i for i, c in enumerate(other_captions) if not any(b.lower() in c.lower() for b in breeds)]
    others = others[no_dog]
    held_back = np.arange(len(others)) % HELD_BACK == 0
    images = np.concatenate([dogs, others[~held_back]])
    labels = torch.cat([labels, torch.full((len(images) - len(dogs),), len(breeds))])
    weight = torch.ones(len(breeds) + 1)  # all others together weigh as much as one breed
    weight[-1] = len(dogs) / (len(images) - len(dogs)) / len(breeds)

    def images_at(batch):
        return augmented(as_batch(images[batch.numpy()]))

    make_folder(WEIGHTS.parent, "the folder")
    judge = fit(PhotoJudge(len(breeds) + 1), images_at, labels, config, weight, max_lr=4e-3)

    read, read_others = judge.read(test)[1], judge.read(others[held_back])[1]
    measured = {
        "breeds": breeds,
        "test_breed_accuracy": (read[:, :-1].argmax(-1) == breed).float().mean().item(),
        "test_dogs_read_as_dogs": (read.argmax(-1) < len(breeds)).float().mean().item(),
        "test_others_read_as_dogs": (read_others.argmax(-1) < len(breeds)).float().mean().item(),
        "test_dogs": len(test),
        "test_others": len(read_others),
        "epochs": config.epochs,
    }
    print(measured)
    facts = {name: json.dumps(value) for name, value in measured.items()}
    write_atomically(WEIGHTS, lambda path: save_file(halved(judge), path, facts))


if __name__ == "__main__":
    run_command(main, Config)
