"""What lesson 6 trains on: images with captions, from a cache on the disk or drawn, tokenized once."""

import math
import random
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from common.command import UserError
from common.data import to_float
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_06_miniglide import shapes
from lesson_06_miniglide.cache import load_cache
from lesson_06_miniglide.presets import GPT2_VOCABULARY, IMAGE_SIZE

NUM_DRAWN = 20_000  # pictures of shapes


@dataclass(frozen=True)
class CaptionedImages:
    name: str  # of the data set
    images: np.ndarray  # uint8 [M, size, size, 3], in memory or on the disk
    rows: torch.Tensor  # int64 [N], which of the images
    captions: list[str]  # different ones
    caption_of: torch.Tensor  # int64 [M], index of each image's caption
    tokens: torch.Tensor | None = None  # int32 [captions, context], or float16 states (outside_text.py)
    mask: torch.Tensor | None = None  # bool [captions, context]
    flip: bool = False  # mirror each image every other time
    cut: int = 0  # of how many images the caption is longer than the context

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        """x_0 float [B, 3, size, size] in [-1, 1], tokens and mask [B, context]."""
        rows = self.rows[indices]
        x_0 = as_batch(self.images[rows.numpy()])
        if self.flip:
            mirrored = torch.rand(len(x_0)) < 0.5
            x_0 = torch.where(mirrored[:, None, None, None], x_0.flip(3), x_0)
        captions = self.caption_of[rows]
        return x_0, self.tokens[captions], self.mask[captions]

    def first(self, count):
        """A batch of at most `count`."""
        return self.batch(torch.arange(min(count, len(self))))

    def captions_of(self, indices):
        return [self.captions[i] for i in self.caption_of[self.rows[indices]].tolist()]

    def most_frequent(self, count):
        counts = Counter(self.caption_of[self.rows].tolist())
        return [self.captions[i] for i, _ in counts.most_common(count)]

    def tokenized(self, tokenizer):
        """With what the network reads of each caption. Says how many captions had to be cut for that."""
        tokens, mask = tokenizer.encode(self.captions)
        long = mask.all(1)  # as long as the context; or longer?
        for i in long.nonzero().flatten().tolist():
            long[i] = len(tokenizer.pieces(self.captions[i])) > mask.shape[1]
        if cut := int(long[self.caption_of[self.rows]].sum()):
            print(f"captions: {cut} of {len(self)} are cut after {mask.shape[1]} tokens")
        tokens = tokens if tokens.is_floating_point() else tokens.int()
        return replace(self, tokens=tokens, mask=mask, cut=cut)

    def split(self, fraction, seed=0):
        """(for training, held back): a random share of the images is never trained on."""
        order = self.rows[torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))]
        held_back = min(math.ceil(fraction * len(self)), len(self) - 1)
        return replace(self, rows=order[held_back:]), replace(self, rows=order[:held_back], flip=False)


def as_batch(images):
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in [-1, 1]."""
    return (
        to_float(torch.from_numpy(np.require(images, requirements=["C", "W"])))
        .permute(0, 3, 1, 2)
        .contiguous()
    )


def captioned_images(name, images, captions, flip=False):
    distinct = list(dict.fromkeys(captions))
    place = {caption: i for i, caption in enumerate(distinct)}
    caption_of = torch.tensor([place[caption] for caption in captions])
    return CaptionedImages(name, images, torch.arange(len(images)), distinct, caption_of, flip=flip)


def load_images(config):
    """The data set that the flags name; drawn shapes if they name none. Raises UserError.

    Shapes are not mirrored, for left is not right there.
    """
    if config.data_dir is None:
        if config.dogs:
            raise UserError(
                "--dogs needs --data-dir, the folder above Images/; get the photos from "
                "http://vision.stanford.edu/aditya86/ImageNetDogs/images.tar"
            )
        print("data: drawn shapes (name a folder of images with --data-dir)")
        return drawn_shapes(config.image_limit or NUM_DRAWN)
    limit = None if config.dogs else config.image_limit
    if config.dogs and config.image_limit:
        print("data: --image-limit is not for --dogs, whose photos are all used")
    images, captions = load_cache(
        config.data_dir, IMAGE_SIZE, config.resize, config.dogs, limit, config.cache_dir, config.allow_broken
    )
    return captioned_images(Path(config.data_dir).resolve().name, images, captions, config.flip)


def drawn_shapes(n, seed=0, held_out=False):
    """n pictures of shapes, or of the pairs of colour and shape that are held out of training."""
    rng = random.Random(seed)
    scenes = [shapes.random_scene(rng, held_out) for _ in range(n)]
    images = np.stack([shapes.draw(scene, rng) for scene in scenes])
    return captioned_images("shapes", images, list(map(str, scenes)))


def make_tokenizer(captions, text, vocabulary=None):
    """A BPE of at most text.vocab_size tokens trained on the captions, or GPT-2's from a folder.

    text: TextConfig. Raises UserError.
    """
    if vocabulary is None:
        return CaptionTokenizer.train(captions, text.vocab_size, text.context)
    return gpt2_tokenizer(vocabulary, text.context)


def gpt2_tokenizer(folder, context):
    """GLIDE's tokenizer, from a folder of GPT-2's encoder.json and vocab.bpe. Raises UserError."""
    files = [Path(folder) / name for name in ("encoder.json", "vocab.bpe")]
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(f"--vocabulary {folder} lacks {missing[0].name}; it takes GPT-2's two files")
    try:
        tokenizer = CaptionTokenizer.from_gpt2_files(*files, context)
    except Exception as error:  # of the library's own kind
        raise UserError(f"--vocabulary {folder} cannot be read ({error})") from None
    if tokenizer.padding_id is None or max(tokenizer.tokenizer.get_vocab().values()) >= GPT2_VOCABULARY:
        raise UserError(f"--vocabulary {folder}: its encoder.json is not GPT-2's")
    return tokenizer
