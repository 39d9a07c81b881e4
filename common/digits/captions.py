"""Captioned MNIST: coloured digits on black, with captions such as "a red seven" or "the digit 7".

Ten pairs of digit and colour are held out of training. A model that can still draw them has learned to
compose digit and colour; a model that cannot has memorized pairs.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common.digits.mnist import Digits

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Every colour has one channel at 255, so the brightest channel of a coloured digit is the gray digit itself.
PALETTE = {
    "red": (255, 90, 90),
    "orange": (255, 165, 60),
    "yellow": (255, 240, 90),
    "green": (80, 255, 110),
    "blue": (90, 150, 255),
    "purple": (210, 110, 255),
    "white": (255, 255, 255),
}
COLOURS = list(PALETTE)
# The colour that each digit, zero to nine, never has in training.
HELD_OUT = ["green", "orange", "purple", "blue", "red", "yellow", "white", "green", "orange", "blue"]
NO_COLOUR = len(COLOURS)  # colour index of a caption that names no colour

WITH_COLOUR = ["a {colour} {digit}", "the digit {digit} in {colour}"]
WITHOUT_COLOUR = ["a {digit}", "the digit {digit}"]
NUM_PHRASINGS = 4  # of the same content: two templates, with the digit as a word or as a numeral


def captions_for_pair(digit: int, colour: int) -> list[str]:
    """Return the four captions of a digit 0-9 and a colour index (NO_COLOUR: no colour is named)."""
    templates = WITHOUT_COLOUR if colour == NO_COLOUR else WITH_COLOUR
    name = "" if colour == NO_COLOUR else COLOURS[colour]
    texts = [t.format(digit=d, colour=name) for t in templates for d in (WORDS[digit], str(digit))]
    return [f"an {t[2:]}" if t.startswith(("a orange", "a eight", "a 8")) else t for t in texts]


# all captions, in the order of `caption_index`
CAPTIONS = [
    caption
    for digit in range(10)
    for colour in range(NO_COLOUR + 1)
    for caption in captions_for_pair(digit, colour)
]


def caption_index(
    digits: Int[Tensor, "n"], colours: Int[Tensor, "n"], phrasings: Int[Tensor, "n"]
) -> Int[Tensor, "n"]:
    """Return the index into CAPTIONS of each caption."""
    return (digits * (NO_COLOUR + 1) + colours) * NUM_PHRASINGS + phrasings


def held_out_mask() -> Bool[Tensor, "10 colours"]:
    """Return True for the pairs of digit and colour that training never shows."""
    mask = torch.zeros(10, len(COLOURS), dtype=torch.bool)
    for digit, colour in enumerate(HELD_OUT):
        mask[digit, COLOURS.index(colour)] = True
    return mask


def colourize(images: Float[Tensor, "n 1 h w"], colours: Int[Tensor, "n"]) -> Float[Tensor, "n 3 h w"]:
    """Colour gray digits in [-1, 1] by palette index."""
    rgb = torch.tensor(list(PALETTE.values())) / 255
    return (images + 1) * rgb[colours][:, :, None, None] - 1


class CaptionedDigits:
    """Coloured digits with captions; colour and caption are drawn again each time a digit is requested.

    digits: gray digits. colour_prob: the fraction of captions that name the colour. Held-out pairs are never
    drawn.
    """

    def __init__(self, digits: Digits, colour_prob: float = 0.8):
        self.name, self.digits, self.colour_prob = digits.name, digits, colour_prob
        self.allowed = (~held_out_mask()).float()

    def __len__(self) -> int:
        return len(self.digits)

    def batch(self, indices: Int[Tensor, "b"]) -> tuple[Float[Tensor, "b 3 32 32"], Int[Tensor, "b"]]:
        """Return RGB images and indices into CAPTIONS, drawn with torch's global generator."""
        labels = self.digits.labels[indices]
        colours = torch.multinomial(self.allowed[labels], 1)[:, 0]
        named = torch.where(torch.rand(len(labels)) < self.colour_prob, colours, NO_COLOUR)
        phrasings = torch.randint(NUM_PHRASINGS, (len(labels),))
        return colourize(self.digits.images[indices], colours), caption_index(labels, named, phrasings)


def balanced_prompts(n: int) -> tuple[list[str], Int[Tensor, "{n}"], Int[Tensor, "{n}"]]:
    """Return n prompts that name digit and colour, with their digits and colour indices.

    All 70 pairs (held-out ones too) and all phrasings are about equally frequent.
    """
    i = torch.arange(n)
    pair = i % (10 * len(COLOURS))
    digits, colours = pair % 10, pair // 10
    phrasings = (i // (10 * len(COLOURS)) + digits + colours) % NUM_PHRASINGS
    return [CAPTIONS[k] for k in caption_index(digits, colours, phrasings)], digits, colours
