"""A network that is trained to fill holes: it sees the known pixels and the mask (GLIDE, section 4.3).

It begins as a network that draws, with more inputs: python lesson_06_miniglide/train.py
--preset tiny_inpainting --start-from BASE
"""

import random
import warnings
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

from common.command import UserError
from common.data import to_float
from lesson_01_ddpm.diffusion import clip
from lesson_06_miniglide.cache import to_rgb
from lesson_06_miniglide.editing import inpaint_sample
from lesson_06_miniglide.sketch import PatchSketchingUNet


class InpaintingUNet(PatchSketchingUNet):
    """(x_t, t, text, image [N, 3, H, W], mask [N, 1, H, W], 1 where the image is known) -> [N, 6, H, W]."""

    def __init__(self, config, text_config, alpha_bar):
        super().__init__(config, text_config, alpha_bar, inpaint=True)

    def picture_of(self, image, mask):
        """What the network sees."""
        return image * mask


def widened(weights, network):
    """The weights of a network with fewer inputs, made fit for this one: to its new inputs, which come after
    x_t, it pays no attention yet."""
    first, c = "unet.first.weight", network.config.in_channels
    x_t, others = weights[first][:, :c], weights[first][:, c:]
    missing = network.state_dict()[first].shape[1] - weights[first].shape[1]
    new = (0, 0, 0, 0, 0, max(0, missing))
    return weights | {first: torch.cat([F.pad(x_t, new), others], 1)}


def random_mask(size, rng):
    """bool [size, size], True where known: to be drawn is all, or a half, a box, or where a brush went."""
    known = Image.new("1", (size, size), 1)
    pen, half = ImageDraw.Draw(known), size // 2
    kind = rng.choice(("all", "half", "box", "brush"))
    if kind == "brush":
        points = [(rng.randint(0, size), rng.randint(0, size)) for _ in range(rng.randint(2, 5))]
        pen.line(points, fill=0, width=rng.randint(size // 10, size // 4), joint="curve")
        return np.array(known)
    w, h = {
        "all": (size, size),
        "half": rng.choice(((half, size), (size, half))),
        "box": (rng.randint(size // 6, 2 * size // 3), rng.randint(size // 6, 2 * size // 3)),
    }[kind]
    left, top = rng.randint(0, size - w), rng.randint(0, size - h)
    if kind == "half":
        left, top = rng.choice((0, size - w)), rng.choice((0, size - h))
    pen.rectangle((left, top, left + w - 1, top + h - 1), fill=0)
    return np.array(known)


def inpaint(diffusion, network, x_0):
    """The task: draw x_0, seeing what a random mask leaves of it."""
    rng = random.Random(torch.randint(2**31, ()).item())
    masks = np.stack([random_mask(x_0.shape[-1], rng) for _ in x_0])
    return x_0, {"image": x_0, "mask": torch.from_numpy(masks).to(x_0)[:, None]}


class Repainting:
    """A picture of which a part is to be drawn anew: what the networks see of it, and the bound that keeps
    it.

    image: float [1 or n, 3, H, W] in [-1, 1]. known: float [1 or n, 1, H, W], 1 where the image is kept.
    """

    def __init__(self, image, known):
        self.image, self.known = image, known

    @classmethod
    def load(cls, image, mask, size):
        """From files, the mask white where to draw. Raises UserError."""
        drawn = coarse(np.array(on_black(read_picture(mask, "--mask"))) >= 128, min(size, 64))
        if not drawn.any():
            raise UserError(f"--mask {mask} is black; make white what is to be drawn anew")
        known = torch.from_numpy(~drawn).float()[None, None]
        return cls(open_picture(image, "--image", size), F.interpolate(known, (size, size)))

    def seen(self, n):
        """What a network sees of it, for n samples."""
        shown = {"image": self.image, "mask": self.known}
        return {name: x.expand(n, -1, -1, -1) for name, x in shown.items()}

    def bound(self, x_0, bound=clip):
        """The predicted x_0, with the known pixels overwritten (a `bound` for any sampler)."""
        known = self.known.to(x_0.device)
        return bound(x_0) * (1 - known) + self.image.to(x_0.device) * known

    def drawn_by(self, network, sampler, n, times, bound=clip):
        """(a sampler, what the network sees) for n samples.

        A network that was trained to fill holes takes `sampler`; any other is made to, each step taken so
        many `times`, x_0 bounded by `bound`.
        """
        if isinstance(network, InpaintingUNet):
            return partial(sampler, bound=partial(self.bound, bound=bound)), self.seen(n)
        kept = {"image": self.image, "known": self.known}
        return partial(inpaint_sample, times=times, bound=bound, **kept), {}


def coarse(painted, size):
    """bool [H, W] -> [size, size], True where any of the pixels is: no stroke is too thin."""
    return np.array(Image.fromarray(painted.astype(np.float32)).resize((size, size), Image.BOX)) > 0


def on_black(picture):
    """A PIL image in gray; of a mask on a transparent ground only what is painted is white."""
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "black"), picture)
    return to_rgb(picture).convert("L")


def open_picture(path, flag, size):
    """float [1, 3, size, size] in [-1, 1], squished. Raises UserError."""
    return squished(read_picture(path, flag), size)


def squished(picture, size, channels=3):
    """A PIL image -> float [1, 1 or 3, size, size] in [-1, 1]."""
    picture = to_rgb(picture).convert("RGB" if channels == 3 else "L").resize((size, size), Image.BICUBIC)
    pixels = np.array(picture).reshape(size, size, channels)
    return to_float(torch.from_numpy(pixels)).permute(2, 0, 1)[None]


def read_picture(path, flag):
    too_large = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(path)
            picture.load()
        return picture
    except (OSError, SyntaxError, *too_large) as error:
        raise UserError(f"{flag} {path} cannot be read as a picture ({error})") from None
