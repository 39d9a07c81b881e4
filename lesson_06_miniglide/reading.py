"""The text transformer's own lesson, before there is a network to read for: what does a caption alone say?

With nothing but noise to look at, the best guess at a picture is the mean of all that have its caption. Here
the text transformer learns to paint that mean, coarsely. It takes minutes, for there is neither noise nor a
UNet; and what stands where in "a red circle left of a blue square" is then there to be read from the UNet's
first step on. That it is not left to the UNet has a reason: as long as the text does not tell the two objects
apart the UNet has no use for places in it, and as long as the UNet has none the text does not learn them.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn
from tqdm import trange

from common.training import batch_indices, learning_rate_factor
from lesson_01_ddpm.unet import attend
from lesson_03_adm.adm_unet import split_heads

COARSE = 8  # pixels a side
BATCH, LEARNING_RATE = 128, 2e-3
HEADS, WIDTH = 4, 16  # of the places' attention, and of each of its heads


class Painter(nn.Module):
    """tokens and mask [N, context] -> the mean picture of the caption [N, 3, COARSE, COARSE].

    It reads in both of the UNet's ways: the vector for the whole caption, through a SiLU, and the states of
    the tokens, at which every place looks with a query of its own.
    """

    def __init__(self, text, emb_channels, width):
        """text: the encoder, which gives a Text of these widths."""
        super().__init__()
        self.text, places = text, COARSE**2
        self.from_embedding = nn.Linear(emb_channels, 3 * places)
        self.queries = nn.Parameter(torch.randn(HEADS, places, WIDTH))
        self.kv = nn.Linear(width, 2 * HEADS * WIDTH)
        self.from_values = nn.Linear(HEADS * WIDTH, 3)

    def forward(self, tokens, mask):
        embedding, states = self.text(tokens, mask)
        whole = self.from_embedding(F.silu(embedding))
        seen = attend(self.queries, *split_heads(self.kv(states), HEADS, 2))
        colours = self.from_values(rearrange(seen, "n heads places d -> n places (heads d)"))
        return whole.view(-1, 3, COARSE, COARSE) + colours.mT.reshape(-1, 3, COARSE, COARSE)


def learn_to_read(network, images, steps, seed=0, quiet=False):
    """Teach the text encoder of a TextUNet by `images` (CaptionedImages, tokenized); nothing else changes.

    Returns the Painter that it learned with.
    """
    torch.manual_seed(seed)
    device = next(network.parameters()).device
    painter = Painter(network.text, network.config.emb_channels, network.text_config.width).to(device)
    optimiser = torch.optim.AdamW(painter.parameters())
    for step in trange(steps, desc="reading", disable=quiet):
        x_0, tokens, mask = (
            x.to(device) for x in images.batch(batch_indices(step, len(images), BATCH, seed))
        )
        coarse = F.adaptive_avg_pool2d(x_0, COARSE)
        loss = F.mse_loss(painter(tokens.long(), mask), coarse)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(painter.parameters(), 1.0)
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * learning_rate_factor(step, step / steps)
        optimiser.step()
    return painter
