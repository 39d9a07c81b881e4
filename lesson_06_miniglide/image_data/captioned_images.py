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
from lesson_06_miniglide.image_data.cache import load_cache, load_source
from lesson_06_miniglide.image_data.hub import hub_source
from lesson_06_miniglide.image_data.records import Caption, Columns, all_captions
from lesson_06_miniglide.shapes.render import render
from lesson_06_miniglide.shapes.scenes import random_scene

IMAGE_SIZE = 64
HUB_CACHES = Path("data/huggingface")  # decoded images of --dataset-name
NUM_SHAPES = 20_000  # rendered images of shapes
DOGS_URL = "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar"


@dataclass(frozen=True)
class CaptionedImages:
    """Images with captions: a `CaptionedDataset` once it is tokenized."""

    name: str  # of the data set
    images: UInt8[np.ndarray, "m size size 3"]  # in memory or on the disk
    indices: Int[Tensor, "n"]  # which of the images belong to this split
    captions: list[str]  # distinct ones
    caption_rows: Int[Tensor, "pairs"]  # indices of the captions of all images, image after image
    first_row: Int[Tensor, "m"]  # where the captions of an image begin in caption_rows
    num_captions: Int[Tensor, "m"]  # how many of them the image has
    tokens: Shaped[Tensor, "captions ..."] | None = None  # int32 token ids, or float16 states (frozen_t5.py)
    mask: Bool[Tensor, "captions length"] | None = None
    flip: bool = False  # mirror each image with probability 1/2
    num_truncated: int = 0  # of the images' captions, those longer than the network reads

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(x[0] for x in self.batch(torch.tensor([index])))

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0 [B, 3, size, size] in [-1, 1], tokens [B, L] and mask [B, L].

        Of an image's captions one is drawn at random, with torch's global generator.
        """
        assert self.tokens is not None and self.mask is not None, "call `tokenized` first"
        rows = self.indices[indices]
        x_0 = to_tensor(self.images[rows.numpy()])
        if self.flip:
            mirrored = torch.rand(len(x_0)) < 0.5
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
        chosen = self.first_row[rows]
        if len(self.caption_rows) > len(self.first_row):  # else, no random number is needed
            chosen = chosen + torch.randint(2**31, chosen.shape) % self.num_captions[rows]
        captions = self.caption_rows[chosen]
        return x_0, self.tokens[captions], self.mask[captions]

    def first(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return a batch of the first images, at most `count`."""
        return self.batch(torch.arange(min(count, len(self))))

    def captions_for(self, indices: Int[Tensor, "b"]) -> list[str]:
        """Return the captions of these images, the first of each."""
        rows = self.first_row[self.indices[indices]]
        return [self.captions[i] for i in self.caption_rows[rows].tolist()]

    def most_frequent(self, count: int) -> list[str]:
        """Return the most frequent captions."""
        counts = Counter(self.all_rows().tolist())
        return [self.captions[i] for i, _ in counts.most_common(count)]

    def all_rows(self) -> Int[Tensor, "rows"]:
        """Return the indices of all captions of this split's images, image after image."""
        first, count = self.first_row[self.indices], self.num_captions[self.indices]
        place = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)
        return self.caption_rows[first.repeat_interleave(count) + place]

    def tokenized(self, tokenizer: Any) -> "CaptionedImages":
        """Return the same images with tokens; print how many captions had to be truncated.

        tokenizer: `encode(captions) -> (tokens, mask)` and `token_ids(caption)`.
        """
        tokens, mask = tokenizer.encode(self.captions)
        long = mask.all(1)  # as long as the context, or longer
        for i in long.nonzero().flatten().tolist():
            long[i] = len(tokenizer.token_ids(self.captions[i])) > mask.shape[1]
        rows = self.all_rows()
        if num_truncated := int(long[rows].sum()):
            print(f"captions: {num_truncated} of {len(rows)} are truncated to {mask.shape[1]} tokens")
        tokens = tokens if tokens.is_floating_point() else tokens.int()
        return replace(self, tokens=tokens, mask=mask, num_truncated=num_truncated)

    def split(self, fraction: float, seed: int = 0) -> tuple["CaptionedImages", "CaptionedImages"]:
        """Return training and validation images; validation is a random fraction.

        Validation images are never mirrored and always have the first of their captions.
        """
        order = self.indices[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]
        count = min(math.ceil(fraction * len(self)), len(self) - 1)
        one_caption = torch.ones_like(self.num_captions)
        validation = replace(self, indices=order[:count], flip=False, num_captions=one_caption)
        return replace(self, indices=order[count:]), validation


def captioned_images(
    name: str, images: UInt8[np.ndarray, "n size size 3"], captions: Sequence[Caption], flip: bool = False
) -> CaptionedImages:
    """Return a data set from images and a caption, or a tuple of captions, per image."""
    of_images = [all_captions(caption) for caption in captions]
    distinct = list(dict.fromkeys(text for texts in of_images for text in texts))
    place = {caption: i for i, caption in enumerate(distinct)}
    rows = torch.tensor([place[text] for texts in of_images for text in texts])
    count = torch.tensor([len(texts) for texts in of_images])
    first = count.cumsum(0) - count
    return CaptionedImages(name, images, torch.arange(len(images)), distinct, rows, first, count, flip=flip)


def load_images(config: Any, size: int = IMAGE_SIZE) -> CaptionedImages:
    """Return the data set that the flags name; shapes if they name none. Raises UserError.

    config: with data_dir, dogs, image_limit, resize, cache_dir, allow_broken and flip; for tables and the Hub
    also with dataset_name, dataset_config_name, image_column, caption_column and split; to crop photos, with
    crop_to_box. size: of the images, in pixels; shapes have IMAGE_SIZE. Shapes are never mirrored, because
    their captions say left and right.
    """
    columns = Columns(
        getattr(config, "image_column", None),
        getattr(config, "caption_column", None),
        getattr(config, "split", "train"),
    )
    if name := getattr(config, "dataset_name", None):
        if config.data_dir or config.dogs:
            raise UserError("--dataset-name excludes --data-dir and --dogs; name one data set")
        if not Path(name).is_dir():
            return load_hub(name, columns, config, size)
        config = replace(config, data_dir=name)  # Hugging Face's library, too, takes the name of a folder
    crop_to_box = getattr(config, "crop_to_box", False)
    if config.data_dir is None:
        if config.dogs:
            raise UserError(
                f"--dogs needs --data-dir, the folder above Images/; get the photos from {DOGS_URL}"
            )
        if crop_to_box:
            raise UserError("--crop-to-box needs --data-dir, the folder above Images/ and Annotation/")
        if size != IMAGE_SIZE:
            raise UserError(f"--data-dir is missing: shapes have 64x64 pixels, and {size}x{size} are needed")
        print("data: shapes (name a folder of images with --data-dir)")
        return make_shapes(config.image_limit or NUM_SHAPES)
    limit = None if config.dogs else config.image_limit
    if config.dogs and config.image_limit:
        print("data: --image-limit does not apply to --dogs, all of whose photos are used")
    images, captions = load_cache(
        config.data_dir,
        size,
        config.resize,
        config.dogs,
        limit,
        config.cache_dir,
        config.allow_broken,
        columns,
        crop_to_box,
    )
    return captioned_images(Path(config.data_dir).resolve().name, images, captions, config.flip)


def load_hub(name: str, columns: Columns, config: Any, size: int = IMAGE_SIZE) -> CaptionedImages:
    """Return a data set of the Hugging Face Hub; see `load_images`. Raises UserError."""
    if getattr(config, "crop_to_box", False):
        raise UserError("--crop-to-box needs --data-dir, the folder above Images/ and Annotation/")
    source = hub_source(name, config.dataset_config_name, columns)
    caches = Path(config.cache_dir or HUB_CACHES)
    images, captions = load_source(
        source,
        caches,
        resize=config.resize,
        size=size,
        limit=config.image_limit,
        allow_broken=config.allow_broken,
    )
    return captioned_images(source.name, images, captions, config.flip)


def make_shapes(n: int, seed: int = 0, held_out: bool = False) -> CaptionedImages:
    """Render n images of shapes; if `held_out`, of the pairs of colour and shape that training lacks."""
    rng = random.Random(seed)
    scenes = [random_scene(rng, held_out) for _ in range(n)]
    images = np.stack([render(scene, rng) for scene in scenes])
    return captioned_images("shapes", images, list(map(str, scenes)))
