"""The network behind the evaluation classifiers of photos, and how their training photos are varied."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.digits.classifier import conv_bn_silu, half_state_dict
from common.errors import UserError
from common.files import make_folder, write_atomically
from common.images import to_tensor

NUM_FEATURES = 128
Pixels = UInt8[np.ndarray, "n 64 64 3"]


class PhotoClassifier(nn.Module):
    """Images [N, 3, 64, 64] in [-1, 1] -> features [N, 128] -> logits [N, classes]."""

    def __init__(self, classes: Sequence[str]):
        super().__init__()
        self.classes = list(classes)
        self.body = nn.Sequential(
            conv_bn_silu(3, 32), conv_bn_silu(32, 48, 2), conv_bn_silu(48, 64), conv_bn_silu(64, 96, 2),
            conv_bn_silu(96, 96), conv_bn_silu(96, 128, 2), conv_bn_silu(128, 160), conv_bn_silu(160, 192, 2),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, NUM_FEATURES),
        )  # fmt: skip
        self.head = nn.Sequential(nn.SiLU(), nn.Dropout(0.3), nn.Linear(NUM_FEATURES, len(self.classes)))

    def forward(self, images: Float[Tensor, "n 3 64 64"]) -> Float[Tensor, "n classes"]:
        return self.head(self.body(images))

    @torch.inference_mode()
    def predict(
        self, images: Pixels, batch_size: int = 500
    ) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n classes"]]:
        """Return features and class probabilities of uint8 images."""
        starts = range(0, len(images), batch_size)
        features = torch.cat([self.body(to_tensor(images[i : i + batch_size])) for i in starts])
        return features, self.head(features).softmax(-1)


def read_weights(path: Path, command: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the weights of a classifier and what was measured of it. Raises UserError if there are none."""
    if not path.exists():
        raise UserError(f"{path} does not exist; train it: {command} --help")
    with safe_open(path, "pt") as file:
        metadata = {name: json.loads(value) for name, value in file.metadata().items()}
        return {k: file.get_tensor(k) for k in file.keys()}, metadata  # noqa: SIM118 (not a dict)


def write_weights(path: Path, classifier: PhotoClassifier, measured: Mapping[str, Any]) -> None:
    """Write the weights of a classifier in half precision, with what was measured of it as metadata."""
    make_folder(path.parent, "the folder")
    metadata = {name: json.dumps(value) for name, value in measured.items()}
    write_atomically(path, lambda temporary: save_file(half_state_dict(classifier), temporary, metadata))


def augment(images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 h w"]:
    """Mirror, shift, enlarge and recolour each image a little."""
    n = len(images)
    scale = 1 - 0.3 * torch.rand(n)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * torch.where(torch.rand(n) < 0.5, -1, 1), scale
    theta[:, :, 2] = (2 * torch.rand(n, 2) - 1) * (1 - scale)[:, None]
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, align_corners=False)
    contrast, colour = 1 + 0.2 * torch.randn(n, 1, 1, 1), 0.1 * torch.randn(n, 3, 1, 1)
    return images * contrast + colour
