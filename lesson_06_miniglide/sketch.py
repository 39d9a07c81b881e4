"""A sketch: what a caption alone says of the picture. The tiny presets' UNet sees it beside x_t.

With nothing but noise to look at, the best guess at a picture is the mean of all that have its caption. The
text transformer learns to paint this mean, coarsely, before there is a UNet to read for: that takes minutes,
for there is no noise in it. What stands where in "a red circle left of a blue square" is then there to be
seen. Left alone with a vector for the caption a UNet has to find out for itself what left is, in pictures
of which it sees only noise, and the text what the UNet wants to know: it takes longer than two cores last.
"""

from typing import ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import trange

from common.training import batch_indices, learning_rate_factor
from lesson_01_ddpm.unet import attend
from lesson_03_adm.adm_unet import split_heads
from lesson_04_text_conditioning.velocity import VelocityUNet
from lesson_05_cfg.guidance import drop_captions
from lesson_06_miniglide.patches import PatchVelocityUNet

SIDE, CONTRAST = 8, 4  # pixels of a sketch; a mean is faint
BATCH, LEARNING_RATE, DROPPED = 128, 2e-3, 0.1
HEADS, WIDTH = 4, 16  # of the pixels' attention, and of each of its heads


class Sketch(nn.Module):
    """Text -> the mean picture of the caption [N, 3, SIDE, SIDE].

    It reads in both of the UNet's ways: the vector for the whole caption, through a SiLU, and the states of
    the tokens, at which every pixel looks with a query of its own.
    """

    def __init__(self, emb_channels, width):
        """The widths of the Text's embedding and states."""
        super().__init__()
        self.from_embedding = nn.Linear(emb_channels, 3 * SIDE**2)
        self.queries = nn.Parameter(torch.randn(HEADS, SIDE**2, WIDTH))
        self.kv = nn.Linear(width, 2 * HEADS * WIDTH)
        self.from_values = nn.Linear(HEADS * WIDTH, 3)

    def forward(self, text):
        whole = self.from_embedding(F.silu(text.embedding))
        seen = attend(self.queries, *split_heads(self.kv(text.states), HEADS, 2))
        colours = self.from_values(rearrange(seen, "n heads pixels d -> n pixels (heads d)"))
        return (whole + colours.mT.flatten(1)).view(-1, 3, SIDE, SIDE)


class SketchingUNet(VelocityUNet):
    """A VelocityUNet that sees the caption's sketch, as an upsampler sees its small picture."""

    # What reads has had its lesson, and what it says should not change while the UNet learns to use it.
    slow: ClassVar = {"text": 0.003, "sketch": 0.003}

    def __init__(self, config, text_config, alpha_bar, **beside):
        super().__init__(config, text_config, alpha_bar, upsample=True, **beside)
        self.sketch = Sketch(config.emb_channels, text_config.width)

    def forward(self, x_t, t, text, **seen):
        sketch = self.sketch(text)
        sketch = CONTRAST * (sketch - sketch.mean((1, 2, 3), keepdim=True))
        return super().forward(x_t, t, text, low_res=sketch, **seen)


class PatchSketchingUNet(SketchingUNet, PatchVelocityUNet):
    """The same on patches."""


def learn_to_sketch(network, images, steps, seed=0, quiet=False):
    """Teach a SketchingUNet's text encoder and its sketch by `images` (CaptionedImages, tokenized); the UNet
    stays as it is."""
    torch.manual_seed(seed)
    device = next(network.parameters()).device
    readers = nn.ModuleList([network.text, network.sketch])
    optimiser = torch.optim.AdamW(readers.parameters())
    for step in trange(steps, desc="learning to sketch", disable=quiet):
        x_0, tokens, mask = (
            x.to(device) for x in images.batch(batch_indices(step, len(images), BATCH, seed))
        )
        coarse = F.adaptive_avg_pool2d(x_0, SIDE)
        text = network.encode_text(tokens, drop_captions(mask, DROPPED))
        loss = F.mse_loss(network.sketch(text), coarse)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(readers.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, step / steps)
        optimiser.step()
