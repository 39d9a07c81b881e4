"""The judge: a small classifier of MNIST digits, whose features measure every generator of these lessons.

`python -m common.classifier` trains it (about six minutes on two CPU cores), measures it on the test set and
writes common/pretrained/. It was fixed before any generator was tuned; training it anew changes every number
in the lessons. `--dataset drawn` trains on drawn digits alone, prints how well that reads real MNIST, and
writes nothing.
"""

import json
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from common.command import autocast, run_command
from common.data import load_digits

PRETRAINED = Path(__file__).parent / "pretrained"
NUM_FEATURES = 64


def block(c_in, c_out, stride=1):
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.SiLU())


class Classifier(nn.Module):
    """float [N, 1, 32, 32] in [-1, 1] -> features [N, 64] -> logits [N, 10]."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            block(1, 24), block(24, 32, 2), block(32, 48), block(48, 64, 2), block(64, 64), block(64, 96, 2),
            nn.Flatten(), nn.Linear(96 * 4 * 4, NUM_FEATURES),
        )  # fmt: skip
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Linear(NUM_FEATURES, 10))

    def forward(self, images):
        return self.head(self.body(images))

    @torch.inference_mode()
    def read(self, images, batch_size=1000):
        """Features [N, 64] and class probabilities [N, 10] of images, on the CPU in float32."""
        device = self.head[2].weight.device
        features = torch.cat([self.body(x.to(device)) for x in images.split(batch_size)])
        return features.cpu(), self.head(features).softmax(-1).cpu()


@cache
def judge():
    """The shipped classifier, ready to read."""
    return ready(Classifier(), load_file(PRETRAINED / "classifier.safetensors"))


def ready(classifier, weights):
    """The classifier with these weights, ready to read."""
    classifier.load_state_dict({k: v if v.dtype == torch.int64 else v.float() for k, v in weights.items()})
    return classifier.eval().requires_grad_(False)


def halved(classifier):
    """Its weights in half precision; what counts batches stays whole."""
    return {k: v.half() if v.is_floating_point() else v for k, v in classifier.state_dict().items()}


def jitter(images):
    """Turn, scale, shear and shift each image a little."""
    n = len(images)
    matrix = torch.eye(2).repeat(n, 1, 1) + 0.1 * torch.randn(n, 2, 2)
    shift = 0.06 * torch.randn(n, 2, 1)
    grid = F.affine_grid(torch.cat([matrix, shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@dataclass(frozen=True)
class ClassifierConfig:
    """Train the classifier that measures all lessons."""

    dataset: str = "mnist"  # mnist (writes common/pretrained) or drawn (prints only)
    data_dir: str | None = None  # the folder above MNIST/raw; default $LESSONS_DATA, else a download to data/
    epochs: int = 14
    batch_size: int = 128
    seed: int = 0


def main(config):
    torch.manual_seed(config.seed)
    train, test = (
        load_digits(config.dataset, config.data_dir),
        load_digits("mnist", config.data_dir, train=False),
    )
    classifier = fit(Classifier(), lambda batch: jitter(train.images[batch]), train.labels, config)
    features, probabilities = classifier.read(test.images)
    accuracy = (probabilities.argmax(-1) == test.labels).float().mean().item()
    print(f"trained on {train.name}: reads {accuracy:.2%} of the {len(test.labels)} MNIST test digits")
    if train.name == "mnist":
        save(classifier, train, test, features, accuracy, config)


def fit(classifier, images_at, labels, config, weight=None, max_lr=6e-3):
    """Train for `config.epochs`. images_at: (indices) -> images, augmented. weight: of each class."""
    steps = config.epochs * math.ceil(len(labels) / config.batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps)
    with tqdm(total=steps, desc="classifier") as bar:
        for _ in range(config.epochs):
            for batch in torch.randperm(len(labels)).split(config.batch_size):
                with autocast("cpu"):
                    logits = classifier(images_at(batch))
                loss = F.cross_entropy(logits.float(), labels[batch], weight, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.eval()


def save(classifier, train, test, test_features, accuracy, config):
    """Weights in half precision, and the features that let every number be had without the data set."""
    PRETRAINED.mkdir(exist_ok=True)
    metadata = {"command": f"python -m common.classifier --epochs {config.epochs} --seed {config.seed}"}
    metadata |= {"test_accuracy": json.dumps(accuracy)}
    save_file(halved(classifier), PRETRAINED / "classifier.safetensors", metadata)
    judge.cache_clear()
    features = judge().read(train.images)[0]  # as the shipped weights, rounded to half, see it
    test_features, test_probabilities = judge().read(test.images)
    features = features.double()
    save_file(
        {
            "train_mean": features.mean(0),
            "train_covariance": features.T.cov(),
            "test_features": test_features.half(),
            "test_labels": test.labels.to(torch.uint8),
            "test_confidence": test_probabilities.amax(-1).half(),
        },
        PRETRAINED / "mnist_features.safetensors",
        {"num_train": str(len(train.labels))},
    )


if __name__ == "__main__":
    run_command(main, ClassifierConfig)
