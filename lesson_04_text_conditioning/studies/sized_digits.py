"""Digits of two sizes, for the open task of text_conditioning.ipynb."""

import torch
import torch.nn.functional as F
from jaxtyping import Int
from torch import Tensor

from common.digits.captions import CAPTIONS, NO_COLOUR, NUM_PHRASINGS, CaptionedDigits
from common.digits.mnist import Digits
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer

CAPTIONS_PER_DIGIT = NUM_PHRASINGS * (NO_COLOUR + 1)


def small_caption(caption: str) -> str:
    """Insert "small" behind the article: "an orange six" becomes "a small orange six"."""
    article, rest = caption.split(" ", 1)
    return f"{'a' if article == 'an' else article} small {rest}"


class SizedDigits:
    """Captioned digits of which half are shrunk to 20x20 pixels, with "small" in their captions.

    held_out: a digit that is never small. `captions` are those of large digits, then those of small ones.
    """

    def __init__(self, digits: Digits, held_out: int = 7):
        self.captioned, self.held_out = CaptionedDigits(digits), held_out
        self.captions = [*CAPTIONS, *map(small_caption, CAPTIONS)]
        self.tokenizer = CaptionTokenizer.train(self.captions)
        self.tokens, self.mask = self.tokenizer.encode(self.captions)

    def __len__(self) -> int:
        return len(self.captioned)

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0 [B, 3, 32, 32], tokens [B, L] and mask [B, L]; sizes, colours, captions are random."""
        images, ids = self.captioned.batch(indices)
        small = (torch.rand(len(images)) < 0.5) & (ids // CAPTIONS_PER_DIGIT != self.held_out)
        shrunk = F.interpolate(images, (20, 20), mode="bilinear", antialias=True)
        shrunk = F.pad(shrunk, [6] * 4, value=-1)
        ids = ids + len(CAPTIONS) * small
        return torch.where(small[:, None, None, None], shrunk, images), self.tokens[ids], self.mask[ids]
