"""Captioned MNIST: a coloured digit on black and a caption that names the digit, with or without the colour.

Ten digit-colour pairs are held out: no training picture shows them. Whether a model draws them nevertheless
tells whether it composes digit and colour, or remembers pairs.
"""

import torch

WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
# Each colour has a channel at 255, so the brightest channel of a coloured digit is the gray digit itself.
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
NO_COLOUR = len(COLOURS)  # the index that stands for "the caption names no colour"

WITH_COLOUR = ["a {colour} {digit}", "the digit {digit} in {colour}"]
WITHOUT_COLOUR = ["a {digit}", "the digit {digit}"]
VARIANTS = 4  # of saying the same: two templates, word or numeral


def captions_of(digit, colour):
    """The four captions of a digit 0-9 and a colour's index; NO_COLOUR names none."""
    templates = WITHOUT_COLOUR if colour == NO_COLOUR else WITH_COLOUR
    name = "" if colour == NO_COLOUR else COLOURS[colour]
    texts = [t.format(digit=d, colour=name) for t in templates for d in (WORDS[digit], str(digit))]
    return [f"an {t[2:]}" if t.startswith(("a orange", "a eight", "a 8")) else t for t in texts]


# every caption there is, in the order of caption_index
CAPTIONS = [
    text for digit in range(10) for colour in range(NO_COLOUR + 1) for text in captions_of(digit, colour)
]


def caption_index(digits, colours, variants):
    """Where in CAPTIONS the caption stands. All int64 [N]."""
    return (digits * (NO_COLOUR + 1) + colours) * VARIANTS + variants


def held_out_mask():
    """bool [10, colours]: True for the pairs that training never shows."""
    mask = torch.zeros(10, len(COLOURS), dtype=torch.bool)
    for digit, colour in enumerate(HELD_OUT):
        mask[digit, COLOURS.index(colour)] = True
    return mask


def paint(images, colours):
    """Gray digits [N, 1, H, W] in [-1, 1] and colour indices [N] -> RGB [N, 3, H, W] in [-1, 1]."""
    rgb = torch.tensor(list(PALETTE.values())) / 255
    return (images + 1) * rgb[colours][:, :, None, None] - 1


class CaptionedDigits:
    """Each time it is asked for, a digit gets a colour (never a held-out one) and one of its captions.

    named: the share of captions that name the colour.
    """

    def __init__(self, digits, named=0.8):
        self.digits, self.named = digits, named
        self.allowed = (~held_out_mask()).float()

    def __len__(self):
        return len(self.digits.labels)

    def batch(self, indices):
        """RGB images [B, 3, 32, 32] and indices into CAPTIONS [B], drawn from torch's global generator."""
        labels = self.digits.labels[indices]
        colours = torch.multinomial(self.allowed[labels], 1)[:, 0]
        said = torch.where(torch.rand(len(labels)) < self.named, colours, NO_COLOUR)
        variants = torch.randint(VARIANTS, (len(labels),))
        return paint(self.digits.images[indices], colours), caption_index(labels, said, variants)


def balanced_prompts(n):
    """n prompts that name digit and colour, every pair (held-out ones too) and every wording equally often.

    Returns captions (list of n), digits [n], colours [n].
    """
    i = torch.arange(n)
    pair = i % (10 * len(COLOURS))
    digits, colours = pair % 10, pair // 10
    variants = (i // (10 * len(COLOURS)) + digits + colours) % VARIANTS
    return [CAPTIONS[k] for k in caption_index(digits, colours, variants)], digits, colours
