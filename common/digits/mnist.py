"""Digits in memory: MNIST where it is available, synthetic digits where it is not.

Images are float [N, 1, 32, 32] in [-1, 1]: 28x28 pixels with a border of 2.
"""

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from common.cli import check_choice
from common.digits.synthetic import render_digits
from common.errors import UserError
from common.images import to_float

if TYPE_CHECKING:
    from torchvision.datasets import MNIST

IMAGE_SIZE = 32
NUM_SYNTHETIC = 15_000  # synthetic digits for training; a fifth as many for validation
ALIASES = {"drawn": "synthetic"}  # the name of earlier READMEs


@dataclass(frozen=True)
class Digits:
    """Labelled images in memory; a `Dataset` whose batches are (images, labels)."""

    name: str  # "mnist" or "synthetic"
    images: Float[Tensor, "n c 32 32"]  # in [-1, 1]
    labels: Int[Tensor, "n"]

    def __len__(self) -> int:
        return len(self.labels)

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Tensor, Tensor]:
        return self.images[indices], self.labels[indices]


def load_digits(
    dataset: str = "auto", data_dir: str | None = None, train: bool = True, channels: int = 1
) -> Digits:
    """Load all digits of a split into memory, and print which data set they come from if it is a fallback.

    dataset: "auto" takes MNIST if possible, else synthetic digits; "mnist" raises UserError instead of
    falling back; "synthetic" never looks for MNIST. data_dir: the folder that contains MNIST/raw; by default
    $LESSONS_DATA, else MNIST is downloaded to ./data. channels: 1, or 3 for gray RGB images.
    """
    dataset = ALIASES.get(dataset, dataset)
    check_choice("--dataset", dataset, ("auto", "mnist", "synthetic"))
    if dataset != "synthetic":
        try:
            mnist = load_mnist(data_dir, train)
            return Digits("mnist", preprocess(mnist.data, channels), mnist.targets)
        except UserError as error:
            if dataset == "mnist" or data_dir is not None:
                raise
            print(f"data: synthetic digits, because {error}")
    labels = torch.arange(NUM_SYNTHETIC if train else NUM_SYNTHETIC // 5) % 10
    images = render_digits(labels, torch.Generator().manual_seed(int(train)))
    return Digits("synthetic", preprocess(images, channels), labels)


def load_splits(dataset: str = "auto", data_dir: str | None = None) -> tuple[Digits, Digits]:
    """Return the training and the validation split, chosen as in `load_digits`. Raises UserError."""
    return load_digits(dataset, data_dir, train=True), load_digits(dataset, data_dir, train=False)


def load_mnist(data_dir: str | None, train: bool) -> "MNIST":
    """Return torchvision's MNIST from `data_dir`, from $LESSONS_DATA, or downloaded to ./data.

    Raises UserError if a named folder does not contain MNIST, or if the download fails.
    """
    from torchvision.datasets import MNIST  # here, because importing it takes seconds

    for folder, source in ((data_dir, "--data-dir"), (os.environ.get("LESSONS_DATA"), "$LESSONS_DATA")):
        if folder:
            try:
                return MNIST(folder, train=train)
            except (RuntimeError, OSError, ValueError):
                raw = Path(folder) / "MNIST" / "raw"
                raise UserError(
                    f"{source} {folder} holds no MNIST (looked for {raw}/train-images-idx3-ubyte and three "
                    "more); name the folder above MNIST, or leave it out to download"
                ) from None
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return MNIST("data", train=train, download=True)
    except (RuntimeError, OSError) as error:
        for folder in ("data/MNIST/raw", "data/MNIST", "data"):  # remove what the attempt created, if empty
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MNIST could not be downloaded ({reason}); check the network, name a folder with --data-dir, "
            "or use --dataset synthetic"
        ) from None


def preprocess(images: UInt8[Tensor, "n 28 28"], channels: int = 1) -> Float[Tensor, "n {channels} 32 32"]:
    """Pad uint8 images to 32x32 and scale them to [-1, 1]; the channels share their memory."""
    return to_float(F.pad(images, (2, 2, 2, 2)))[:, None].expand(-1, channels, -1, -1)
