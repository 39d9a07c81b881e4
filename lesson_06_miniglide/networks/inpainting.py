"""Training a network to fill masked regions: it sees the known pixels and the mask (GLIDE, section 4.3).

Such a network starts from one that draws, with more input channels:

    python lesson_06_miniglide/train.py --preset tiny_inpainting --init-from BASE
"""

import random
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool
from PIL import Image, ImageDraw
from torch import Tensor, nn

from lesson_01_ddpm.diffusion import GaussianDiffusion


def expand_input_conv(weights: dict[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return the weights of a network with fewer input channels, extended to fit `network`.

    The further inputs come after x_t and get zero weights, so that the network starts by ignoring them.
    Weights of a network with other parameters are returned unchanged.
    """
    state = network.state_dict()
    name = next((name for name in weights if name.endswith("unet.conv_in.weight")), "")
    if name not in state:
        return weights
    missing = state[name].shape[1] - weights[name].shape[1]
    return weights | {name: F.pad(weights[name], (0, 0, 0, 0, 0, max(0, missing)))}


def random_mask(size: int, rng: random.Random) -> Bool[np.ndarray, "{size} {size}"]:
    """Return a mask, True where known; unknown is everything, a half, a box or a brush stroke."""
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


def inpainting_task(diffusion: GaussianDiffusion, network: Any, x_0: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The task: draw x_0, given the part of it that a random mask leaves."""
    rng = random.Random(torch.randint(2**31, ()).item())
    masks = np.stack([random_mask(x_0.shape[-1], rng) for _ in x_0])
    return x_0, {"inpaint_image": x_0, "inpaint_mask": torch.from_numpy(masks).to(x_0)[:, None]}
