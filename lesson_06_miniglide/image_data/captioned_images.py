"""What lesson 6 trains on: images with captions, from a cache on the disk or rendered, tokenized once."""

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int, Shaped, UInt8
from torch import Tensor

from common.errors import UserError
from common.images import to_tensor
from lesson_06_miniglide.image_data.cache import load_cache
from lesson_06_miniglide.shapes.render import render
from lesson_06_miniglide.shapes.scenes import random_scene

IMAGE_SIZE = 64
NUM_SHAPES = 20_000  # rendered images of shapes
DOGS_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar"


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions: a `CaptionedDataset` once it is tokenized."""

    name: str  # of the data set
    images: UInt8[np.ndarray, "m size size 3"]  # in memory or on the disk
    indices: Int[Tensor, "n"]  # which of the images belong to this split
    captions: list[str]  # distinct ones
    caption_of: Int[Tensor, "m"]  # index of each image's caption
    tokens: Shaped[Tensor, "captions ..."] | None = None  # int32 token ids, or float16 states (frozen_t5.py)
    mask: Bool[Tensor, "captions length"] | None = None
    flip: bool = False  # mirror each image with probability 1/2
    num_truncated: int = 0  # images whose caption is longer than the network reads

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(x[0] for x in self.batch(torch.tensor([index])))

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0 [B, 3, size, size] in [-1, 1], tokens [B, L] and mask [B, L]."""
        assert self.tokens is not None and self.mask is not None, "call `tokenized` first"
        rows = self.indices[indices]
        x_0 = to_tensor(self.images[rows.numpy()])
        if self.flip:
            mirrored = torch.rand(len(x_0)) < 0.5
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
        captions = self.caption_of[rows]
        return x_0, self.tokens[captions], self.mask[captions]

    def first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch of the first images, at most `count`."""
        return self.batch(torch.arange(min(count, len(self))))

    def captions_for(self, indices: Int[Tensor, "b"]) -> list[str]:
        """Return the captions of these images."""
        return [self.captions[i] for i in self.caption_of[self.indices[indices]].tolist()]

    def most_frequent(self, count: int) -> list[str]:
        """Return the most frequent captions."""
        counts = Counter(self.caption_of[self.indices].tolist())
        return [self.captions[i] for i, _ in counts.most_common(count)]

    def tokenized(self, tokenizer: Any) -> "CaptionedImages":
        """Return the same images with tokens; print how many captions had to be truncated.

        tokenizer: `encode(captions) -> (tokens, mask)` and `token_ids(caption)`.
        """
        tokens, mask = tokenizer.encode(self.captions)
        long = mask.all(1)  # as long as the context, or longer
        for i in long.nonzero().flatten().tolist():
            long[i] = len(tokenizer.token_ids(self.captions[i])) > mask.shape[1]
        if num_truncated := int(long[self.caption_of[self.indices]].sum()):
            print(f"captions: {num_truncated} of {len(self)} are truncated to {mask.shape[1]} tokens")
        tokens = tokens if tokens.is_floating_point() else tokens.int()
        return replace(self, tokens=tokens, mask=mask, num_truncated=num_truncated)

    def split(self, fraction: float, seed: int = 0) -> tuple["CaptionedImages", "CaptionedImages"]:
        """Return training and validation images; validation is a random fraction, never mirrored."""
        order = self.indices[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]
        count = min(math.ceil(fraction * len(self)), len(self) - 1)
        return replace(self, indices=order[count:]), replace(self, indices=order[:count], flip=False)


def captioned_images(
    name: str, images: UInt8[np.ndarray, "n size size 3"], captions: Sequence[str], flip: bool = False
) -> CaptionedImages:
    """Return a data set from images and one caption per image."""
    distinct = list(dict.fromkeys(captions))
    place = {caption: i for i, caption in enumerate(distinct)}
    caption_of = torch.tensor([place[caption] for caption in captions])
    return CaptionedImages(name, images, torch.arange(len(images)), distinct, caption_of, flip=flip)


def load_images(config: Any) -> CaptionedImages:
    """Return the data set that the flags name; shapes if they name none. Raises UserError.

    config: with data_dir, dogs, image_limit, resize, cache_dir, allow_broken and flip. Shapes are never
    mirrored, because their captions say left and right.
    """
    if config.data_dir is None:
        if config.dogs:
            raise UserError(
                f"--dogs needs --data-dir, the folder above Images/; get the photos from {DOGS_URL}"
            )
        print("data: shapes (name a folder of images with --data-dir)")
        return make_shapes(config.image_limit or NUM_SHAPES)
    limit = None if config.dogs else config.image_limit
    if config.dogs and config.image_limit:
        print("data: --image-limit does not apply to --dogs, all of whose photos are used")
    images, captions = load_cache(
        config.data_dir, IMAGE_SIZE, config.resize, config.dogs, limit, config.cache_dir, config.allow_broken
    )
    return captioned_images(Path(config.data_dir).resolve().name, images, captions, config.flip)


def make_shapes(n: int, seed: int = 0, held_out: bool = False) -> CaptionedImages:
    """Render n images of shapes; if `held_out`, of the pairs of colour and shape that training lacks."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, held_out) for _ in range(n)]
    images = np.stack([render(scene, rng) for scene in scenes])
    return captioned_images("shapes", images, list(map(str, scenes)))
