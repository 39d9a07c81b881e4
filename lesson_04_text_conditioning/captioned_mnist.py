"""The data of lessons 4 and 5: captioned digits as tokens."""

import torch
from jaxtyping import Int
from torch import Tensor

from common.digits.captions import CAPTIONS, CaptionedDigits
from common.digits.mnist import Digits
from common.protocols import Tokenizer
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer

# Shown in figures: pairs from training, one caption without a colour, and two held-out pairs.
PROMPTS = ["a red seven", "the digit 2 in white", "the digit 5 in purple", "a yellow eight", "an orange six"]
PROMPTS += ["the digit 4", "a blue three", "a green 0"]


def train_tokenizer() -> CaptionTokenizer:
    """Return a tokenizer trained on all captions of digits."""
    return CaptionTokenizer.train(CAPTIONS)


class TokenizedDigits:
    """Captioned digits whose captions come as tokens: a `CaptionedDataset`.

    tokenizer: anything with `encode(captions) -> (tokens, mask)`.
    """

    def __init__(self, digits: Digits, tokenizer: Tokenizer):
        self.name, self.captioned = digits.name, CaptionedDigits(digits)
        self.tokens, self.mask = tokenizer.encode(CAPTIONS)

    def __len__(self) -> int:
        return len(self.captioned)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(x[0] for x in self.batch(torch.tensor([index])))

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return x_0 [B, 3, 32, 32], tokens [B, L] and mask [B, L]; colours and captions are random."""
        x_0, caption = self.captioned.batch(indices)
        return x_0, self.tokens[caption], self.mask[caption]


def validation_batch(digits: Digits, tokenizer: Tokenizer, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the first n digits with colours and captions that are the same every time."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return TokenizedDigits(digits, tokenizer).batch(torch.arange(n))
