"""Exercises of lesson 6. Fill in a function, then see what its check says:

    python lesson_06_miniglide/exercises.py

No training is needed. The answers stand in solutions.ipynb.
"""

import re

import numpy as np
import torch
from PIL import Image

from common.exercises import WrongAnswer, allclose, run_checks
from common.training.trainer import batch_indices

# -- 1. What is this dog called?        topic: data; easy; 5 minutes


def breed(folder):
    """The caption of a folder of Stanford Dogs: "n02085620-Chihuahua" -> "Chihuahua".

    Hint: how often does `split` split?
    """
    raise NotImplementedError


def check_breed(answer=breed):
    """Names with several hyphens and several words."""
    dogs = {
        "n02085620-Chihuahua": "Chihuahua",
        "n02099601-golden_retriever": "golden retriever",
        "n02089078-black-and-tan_coonhound": "black-and-tan coonhound",
        "n02102040-English_springer": "English springer",
    }
    for folder, caption in dogs.items():
        said = str(answer(folder))
        if re.match(r"n\d", said):
            raise WrongAnswer(f"{said!r} still has the number of its WordNet entry")
        if "_" in said:
            raise WrongAnswer(f"{said!r}: nobody types underscores into a prompt")
        if said != caption:
            raise WrongAnswer(
                f"{folder} is a {caption!r}, not a {said!r}: its name goes on behind the second hyphen"
            )


# -- 2. From file to network        topic: images; easy; 10 minutes


def to_network(image):
    """A PIL image of any mode -> float32 tensor [3, 64, 64] in [-1, 1], squished to a square.

    Hint: `convert`, `resize`, and the channels come last in numpy, first in torch.
    """
    raise NotImplementedError


def check_to_network(answer=to_network):
    """A gradient of known values, a wide image of two colours, other modes."""
    ramp = np.broadcast_to(np.linspace(0, 255, 64).round().astype(np.uint8)[None, :, None], (64, 64, 3))
    x = answer(Image.fromarray(np.ascontiguousarray(ramp)))
    if x.shape == (64, 64, 3):
        raise WrongAnswer("the channels come last; a convolution wants [3, 64, 64]")
    if x.shape != (3, 64, 64) or x.dtype != torch.float32:
        raise WrongAnswer(f"{x.dtype} of shape {tuple(x.shape)}; wanted are 3 channels of 64 x 64 in float32")
    if x.min() >= 0:
        high = x.max().item()
        raise WrongAnswer(
            f"values run from 0 to {high:g}: the schedule is made for [-1, 1] (the original's mistake)"
        )
    expected = torch.from_numpy(ramp[..., 0].copy()).float() / 127.5 - 1
    if allclose(x[0], expected.T):
        raise WrongAnswer("the picture lies on its side: rows and columns have changed places")
    if not torch.allclose(x[0], expected, atol=0.003):
        raise WrongAnswer("0 must become -1 and 255 must become 1, evenly between")
    wide = Image.new("RGB", (128, 64), (255, 51, 51))
    wide.paste((0, 0, 255), (104, 0, 128, 64))  # beyond the middle square
    x = answer(wide)
    if x.shape != (3, 64, 64):
        raise WrongAnswer(f"an image of 128 x 64 pixels comes out as {list(x.shape)}; make it 64 x 64")
    left, right = x.mean(1)[:, [8, 60]].T  # RGB of its two colours
    if left[2] > left[0]:
        raise WrongAnswer("red and blue have changed places")
    if abs(left[0] - 1) > 0.05 or abs(right[2] - 1) > 0.05:
        raise WrongAnswer("of a wide image only the middle is left; squish it, do not crop")
    for mode in ("L", "RGBA", "P", "CMYK"):
        try:
            x = answer(Image.new("RGB", (20, 30), (51, 51, 51)).convert(mode))
        except (RuntimeError, ValueError, TypeError) as error:
            raise WrongAnswer(f"an image of mode {mode} ends in {error!r}; convert to RGB first") from None
        if x.shape != (3, 64, 64) or not torch.allclose(x, torch.tensor(-0.6), atol=0.02):
            raise WrongAnswer(f"an image of mode {mode} comes out wrong; convert to RGB first")


# -- 3. The weight of the bound        topic: L_hybrid; medium; 10 minutes


def hybrid(simple, kl_nats, num_timesteps):
    """L_hybrid of one example from its squared error and its KL term at one t, drawn uniformly from T.

    L_hybrid = L_simple + 0.001 L_vlb; L_vlb is the sum over all t, in bits (1 nat is 1 / ln 2 bits).
    Hint: one term, drawn at random, stands for how many?
    """
    raise NotImplementedError


def check_hybrid(answer=hybrid):
    """The mean over all t must be L_simple's mean + 0.001 times the whole sum."""
    for num_timesteps in (100, 1000):
        kl = np.random.RandomState(0).rand(num_timesteps)
        if abs(answer(0.5, 0.3, num_timesteps) - answer(0.25, 0.3, num_timesteps) - 0.25) > 1e-6:
            raise WrongAnswer("the squared error itself must count once")
        mean = np.mean([answer(0.25, term, num_timesteps) for term in kl])
        bound = kl.sum() / np.log(2)
        weight = (mean - 0.25) / bound
        if abs(weight - 0.001) < 1e-9:
            continue
        if abs(weight * num_timesteps - 0.001) < 1e-6:
            raise WrongAnswer(
                f"the bound counts {num_timesteps} times too little: one term stands for T of them"
            )
        if abs(weight / np.log(2) - 0.001) < 1e-6:
            raise WrongAnswer("the bound is in nats; divide by ln 2")
        raise WrongAnswer(
            f"on average the bound has the weight {weight:.3g}, not 0.001 (T = {num_timesteps})"
        )


# -- 4. Dealing an epoch out        topic: several GPUs; medium; 10 minutes


def deal(step, num_examples, batch_size, rank, world, seed):
    """Which `batch_size` examples process `rank` of `world` takes at a step.

    Hint: `batch_indices(step, num_examples, batch_size, seed)` is what one process would take.
    """
    raise NotImplementedError


def check_deal(answer=deal):
    """Every example once an epoch, whoever has it."""
    n, batch_size, world = 36, 3, 3
    epoch = [[answer(s, n, batch_size, r, world, 0).tolist() for r in range(world)] for s in range(4)]
    if len(epoch[0][0]) != batch_size:
        raise WrongAnswer(f"a process takes {len(epoch[0][0])} examples at a step, not {batch_size}")
    if epoch[0][0] in (epoch[0][1], epoch[0][2]):
        raise WrongAnswer("all processes take the same examples: twice the work for the same gradient")
    seen = sorted(i for step in epoch for part in step for i in part)
    if seen != list(range(n)):
        twice = len(seen) - len(set(seen))
        raise WrongAnswer(f"in one epoch {twice} examples come twice and as many are never seen")
    for seed in (0, 7):
        together = torch.cat([answer(1, n, batch_size, r, world, seed) for r in range(world)])
        alone = batch_indices(1, n, batch_size * world, seed)
        if sorted(together.tolist()) != sorted(alone.tolist()):
            raise WrongAnswer(
                "all together must take what one process would take in one large batch of that seed"
            )


# -- 5. What makes a network small?        topic: parameters; medium; 15 minutes


def attention_parameters(channels, heads, text_width):
    """Parameters of one attention layer of GLIDE: norm, qkv, the text's keys and values, the output.

    GroupNorm has 2 a channel; the three others are linear maps with a bias.
    Hint: does cutting into heads change the size of a matrix?
    """
    raise NotImplementedError


def check_attention_parameters(answer=attention_parameters):
    """Against layers that are built and counted."""
    from lesson_03_adm.adm_unet import ADMConfig
    from lesson_04_text_conditioning.text_unet import TextAttention

    for channels, heads, text_width in ((96, 3, 512), (192, 3, 512), (64, 4, 32)):
        layer = TextAttention(channels, ADMConfig(num_heads=heads), text_width)
        counted = sum(p.numel() for p in layer.parameters())
        said = answer(channels, heads, text_width)
        if answer(channels, 1, text_width) != said:
            raise WrongAnswer("it depends on the number of heads: they share out the channels, they add none")
        if counted - said == 3 * channels + 2 * channels + channels:
            raise WrongAnswer("the biases are missing")
        if counted - said == 2 * channels:
            raise WrongAnswer("GroupNorm has a scale and a shift for every channel")
        if said != counted:
            raise WrongAnswer(
                f"{channels} channels, text width {text_width}: {said:,}, but it has {counted:,}"
            )


CHECKS = [check_breed, check_to_network, check_hybrid, check_deal, check_attention_parameters]

if __name__ == "__main__":
    run_checks(CHECKS)
