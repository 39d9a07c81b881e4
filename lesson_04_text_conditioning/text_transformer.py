"""The text transformer: reads a caption once, gives the UNet one vector for the whole and one for each token.

GLIDE's (Nichol et al. 2022, section 4.1 and the published code): pre-LayerNorm, no mask of any kind, a
padding embedding for each position in place of what a causal mask or an attention mask would do.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from lesson_01_ddpm.unet import attend, zero
from lesson_03_adm.adm_unet import split_heads


@dataclass(frozen=True)
class TextConfig:
    vocab_size: int
    context: int = 8  # tokens
    width: int = 64
    layers: int = 3
    heads: int = 4

    def new_encoder(self, emb_channels):
        """What turns tokens and mask into a Text."""
        return TextTransformer(self, emb_channels)


class Text(NamedTuple):
    """An encoded caption, all that the UNet needs of it."""

    embedding: torch.Tensor  # [N, emb_channels], added to the timestep's
    states: torch.Tensor  # [N, context, width], for the attention layers


class TransformerBlock(nn.Module):
    """Attention among the tokens, an MLP for each; both pre-LayerNorm with a skip. [N, context, width]."""

    def __init__(self, config):
        super().__init__()
        width, self.heads = config.width, config.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc_1, self.fc_2 = nn.Linear(width, 4 * width), zero(nn.Linear(4 * width, width))

    def forward(self, x):
        attended = attend(*split_heads(self.qkv(self.ln_1(x)), self.heads, 3))
        x = x + self.proj(rearrange(attended, "n heads places d -> n places (heads d)"))
        return x + self.fc_2(F.gelu(self.fc_1(self.ln_2(x))))


class TextTransformer(nn.Module):
    """tokens int64 [N, context], mask bool [N, context] -> Text."""

    def __init__(self, config, emb_channels):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} cannot be cut into {config.heads} heads")
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.positional_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.padding_embedding = nn.Parameter(torch.empty(config.context, config.width))
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.final_ln = nn.LayerNorm(config.width)
        self.proj = nn.Linear(config.width, emb_channels)
        # What is said must count from the first step on: padding and positions start small beside the tokens'
        # standard deviation of 1. Not too small: "a red circle left of a blue square" is told from "a blue
        # circle left of a red square" by positions alone.
        nn.init.normal_(self.positional_embedding, std=0.3)
        nn.init.normal_(self.padding_embedding, std=0.02)
        # A long context is mostly padding, which captions have in common. It is taken off, so that an
        # embedding is what a caption adds to the empty one; these are as different as lesson 3's classes.
        nn.init.normal_(self.proj.weight, std=0.2 * config.context / config.width**0.5)
        with torch.no_grad():
            self.proj.bias.copy_(-self.proj.weight @ self.states(self.padding_embedding[None])[0, -1])

    def forward(self, tokens, mask):
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.states(torch.where(mask[..., None], x, self.padding_embedding))  # for token and position
        # The last position, often a padding one, has looked at all the others: it stands for the whole.
        return Text(self.proj(x[:, -1]), x)

    def states(self, x):
        """[N, context, width] -> [N, context, width]."""
        for block in self.blocks:
            x = block(x)
        return self.final_ln(x)
