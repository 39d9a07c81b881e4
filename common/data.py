"""Digits in memory: MNIST where it can be had, drawn digits where it cannot.

Images are float [N, 1, 32, 32] in [-1, 1] (28 x 28 with a border of 2); files and pictures are uint8 in [0,
255]. `to_float` and `to_uint8` are the only places where one becomes the other.
"""

import contextlib
import io
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from common.command import UserError, check_choice
from common.drawn import draw_digits

IMAGE_SIZE = 32
NUM_DRAWN = 15_000  # drawn digits to train on; a fifth of that beside them


@dataclass(frozen=True)
class Digits:
    name: str  # "mnist" or "drawn"
    images: torch.Tensor  # float [N, 1 or 3, 32, 32] in [-1, 1]
    labels: torch.Tensor  # int64 [N]

    def __len__(self):
        return len(self.labels)

    def batch(self, indices):
        return self.images[indices], self.labels[indices]


def to_float(images):
    """uint8 in [0, 255] to float in [-1, 1]."""
    return images.float() / 127.5 - 1


def to_uint8(images):
    """float in [-1, 1], values outside clipped, to uint8 in [0, 255]."""
    return (images.float().clamp(-1, 1) * 127.5 + 127.5).round().byte()


def to_pixels(images):
    """float [N, C, H, W] in [-1, 1] to uint8 [N, H, W, C], as files and numpy have them."""
    return to_uint8(images).permute(0, 2, 3, 1).numpy()


def check_range(x_0):
    """Refuse a batch that is plainly in [0, 1] or [0, 255]: the noise schedule is made for [-1, 1].

    Raises ValueError. A batch with values beyond 1, or whose darkest pixel is just about 0, is no batch of
    pictures in [-1, 1]; pale ones (and one picture alone) may be bright all over.
    """
    low, high = x_0.min().item(), x_0.max().item()
    if high > 1.01 or low < -1.01 or (0 <= low < 0.1 and len(x_0) > 1):
        span = f"x_0 runs from {low:.2f} to {high:.2f}"
        raise ValueError(f"{span}; images must be scaled to [-1, 1] (common.data.to_float)")


def load_digits(dataset="auto", data_dir=None, train=True, channels=1):
    """Load all digits of a split into memory and say in one line which they are.

    dataset: "auto" is MNIST if it can be had, else drawn digits; "mnist" raises UserError instead; "drawn".
    data_dir: the folder that holds MNIST/raw, by default $LESSONS_DATA, else ./data (downloaded to).
    channels: 1, or 3 equal ones.
    """
    check_choice("--dataset", dataset, ("auto", "mnist", "drawn"))
    if dataset != "drawn":
        try:
            mnist = find_mnist(data_dir, train)
            return Digits("mnist", pad(mnist.data, channels), mnist.targets)
        except UserError as error:
            if dataset == "mnist" or data_dir is not None:
                raise
            print(f"data: drawn digits, because {error}")
    labels = torch.arange(NUM_DRAWN if train else NUM_DRAWN // 5) % 10
    drawn = draw_digits(labels, torch.Generator().manual_seed(int(train)))
    return Digits("drawn", pad(drawn, channels), labels)


def load_splits(config):
    """The digits to train on and those held back, as config.dataset and config.data_dir say."""
    return [load_digits(config.dataset, config.data_dir, train) for train in (True, False)]


def find_mnist(data_dir, train):
    """torchvision's MNIST from `data_dir`, from $LESSONS_DATA, or downloaded to ./data. Raises UserError."""
    from torchvision.datasets import MNIST  # here, since loading it takes seconds

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
        for folder in ("data/MNIST/raw", "data/MNIST", "data"):  # what the attempt left behind, if empty
            with contextlib.suppress(OSError):
                os.rmdir(folder)
        reason = str(error).splitlines()[0]
        raise UserError(
            f"MNIST could not be downloaded ({reason}); check the network, name a folder with --data-dir, "
            "or use --dataset drawn"
        ) from None


def pad(images, channels=1):
    """uint8 [N, 28, 28] to float [N, channels, 32, 32] in [-1, 1]; the channels share their memory."""
    return to_float(F.pad(images, (2, 2, 2, 2)))[:, None].expand(-1, channels, -1, -1)
