"""The evaluation classifier: a small convolutional network whose features measure every model of digits.

`python -m common.digits.classifier` trains it (about six minutes on two CPU cores), measures it on the test
set and writes common/digits/pretrained/. It was fixed before any model was tuned; training it again changes
every number in the lessons. `--dataset synthetic` trains on synthetic digits alone, prints the accuracy on
real MNIST, and writes nothing.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from common.cli import PositiveInt, Seed, run_command
from common.device import autocast
from common.digits.mnist import Digits, load_digits

PRETRAINED = Path(__file__).parent / "pretrained"
NUM_FEATURES = 64
Module = TypeVar("Module", bound=nn.Module)


def conv_bn_silu(c_in: int, c_out: int, stride: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(c_in, c_out, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.SiLU())


class DigitClassifier(nn.Module):
    """Images [N, 1, 32, 32] in [-1, 1] -> features [N, 64] -> logits [N, num_classes]."""

    num_features = NUM_FEATURES

    def __init__(self, num_classes: int = 10):
        super().__init__()
        self.num_classes = num_classes
        self.body = nn.Sequential(
            conv_bn_silu(1, 24), conv_bn_silu(24, 32, 2), conv_bn_silu(32, 48), conv_bn_silu(48, 64, 2),
            conv_bn_silu(64, 64), conv_bn_silu(64, 96, 2),
            nn.Flatten(), nn.Linear(96 * 4 * 4, NUM_FEATURES),
        )  # fmt: skip
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Linear(NUM_FEATURES, num_classes))

    def forward(self, images: Float[Tensor, "n 1 32 32"]) -> Float[Tensor, "n classes"]:
        return self.head(self.body(images))

    @torch.inference_mode()
    def predict(
        self, images: Float[Tensor, "n 1 32 32"], batch_size: int = 1000
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n classes"]]:
        """Return features and class probabilities, on the CPU in float32."""
        device = self.head[2].weight.device
        features = torch.cat([self.body(x.to(device)) for x in images.split(batch_size)])
        return features.cpu(), self.head(features).softmax(-1).cpu()


@cache
def load_digit_classifier() -> DigitClassifier:
    """Return the pretrained evaluation classifier, frozen."""
    return load_frozen(DigitClassifier(), load_file(PRETRAINED / "classifier.safetensors"))


def load_frozen(network: Module, weights: Mapping[str, Tensor]) -> Module:
    """Load half- or single-precision weights into a network and freeze it in evaluation mode."""
    network.load_state_dict({k: v if v.dtype == torch.int64 else v.float() for k, v in weights.items()})
    return network.eval().requires_grad_(False)


def half_state_dict(network: nn.Module) -> dict[str, Tensor]:
    """Return the weights in half precision; integer buffers stay as they are."""
    return {k: v.half() if v.is_floating_point() else v for k, v in network.state_dict().items()}


def augment(images: Float[Tensor, "n 1 h w"]) -> Float[Tensor, "n 1 h w"]:
    """Rotate, scale, shear and shift each image a little."""
    n = len(images)
    matrix = torch.eye(2).repeat(n, 1, 1) + 0.1 * torch.randn(n, 2, 2)
    shift = 0.06 * torch.randn(n, 2, 1)
    grid = F.affine_grid(torch.cat([matrix, shift], 2), list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


@dataclass(frozen=True)
class ClassifierConfig:
    """Train the evaluation classifier of digits."""

    dataset: str = "mnist"  # mnist (writes common/digits/pretrained) or synthetic (prints only)
    data_dir: str | None = None  # the folder above MNIST/raw; default $LESSONS_DATA, else a download to data/
    epochs: PositiveInt = 14  # passes over the training digits
    batch_size: PositiveInt = 128  # images per step
    seed: Seed = 0  # of weights, order and augmentation


def main(config: ClassifierConfig) -> None:
    torch.manual_seed(config.seed)
    train = load_digits(config.dataset, config.data_dir)
    test = load_digits("mnist", config.data_dir, train=False)
    classifier = fit(DigitClassifier(), lambda batch: augment(train.images[batch]), train.labels, config)
    _, probabilities = classifier.predict(test.images)
    accuracy = (probabilities.argmax(-1) == test.labels).float().mean().item()
    print(f"trained on {train.name}: {accuracy:.2%} of the {len(test.labels)} MNIST test digits are right")
    if train.name == "mnist":
        save(classifier, train, test, accuracy, config)


def fit(
    classifier: Module,
    images_at: Callable[[Tensor], Tensor],
    labels: Int[Tensor, "n"],
    config: Any,
    class_weight: Tensor | None = None,
    max_lr: float = 6e-3,
) -> Module:
    """Train a classifier for `config.epochs` with batches of `config.batch_size` (AdamW, one-cycle).

    images_at: indices -> augmented images. class_weight: [num_classes], for the cross entropy.
    """
    steps = config.epochs * math.ceil(len(labels) / config.batch_size)
    optimizer = torch.optim.AdamW(classifier.parameters(), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=max_lr, total_steps=steps)
    with tqdm(total=steps, desc="classifier") as bar:
        for _ in range(config.epochs):
            for batch in torch.randperm(len(labels)).split(config.batch_size):
                with autocast("cpu"):
                    logits = classifier(images_at(batch))
                loss = F.cross_entropy(logits.float(), labels[batch], class_weight, label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return classifier.eval()


def save(
    classifier: DigitClassifier, train: Digits, test: Digits, accuracy: float, config: ClassifierConfig
) -> None:
    """Write the weights in half precision, and the features of MNIST that evaluation needs."""
    PRETRAINED.mkdir(exist_ok=True)
    command = f"python -m common.digits.classifier --epochs {config.epochs} --seed {config.seed}"
    metadata = {"command": command, "test_accuracy": json.dumps(accuracy)}
    save_file(half_state_dict(classifier), PRETRAINED / "classifier.safetensors", metadata)
    load_digit_classifier.cache_clear()
    stored = load_digit_classifier()  # features as the stored weights, rounded to half precision, give them
    features = stored.predict(train.images)[0].double()
    test_features, test_probabilities = stored.predict(test.images)
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
