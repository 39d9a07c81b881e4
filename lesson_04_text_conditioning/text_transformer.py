"""The text encoder: a transformer that gives the UNet one vector per caption and one per token.

It is GLIDE's (Nichol et al. 2022, section 4.1 and the published code): pre-LayerNorm, no attention mask, and
a learned padding embedding for each position where there is no token.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.layers import attend
from lesson_01_ddpm.unet import zero_module
from lesson_03_adm.adm_unet import split_heads


@dataclass(frozen=True)
class TextConfig:
    """Settings of the text transformer, saved in every checkpoint."""

    vocab_size: int
    context_length: int = 8  # tokens
    width: int = 64
    layers: int = 3
    heads: int = 4

    def build_encoder(self, emb_channels: int) -> nn.Module:
        """Return a module (tokens, mask) -> TextEncoding with a pooled embedding of `emb_channels`."""
        return TextTransformer(self, emb_channels)


class TextEncoding(NamedTuple):
    """An encoded caption: everything that the UNet sees of it."""

    pooled: Float[Tensor, "n emb_channels"]  # added to the timestep embedding
    token_states: Float[Tensor, "n length width"]  # keys and values for the attention layers


class TransformerBlock(nn.Module):
    """Self-attention among the tokens and an MLP per token, both with pre-LayerNorm and a skip connection."""

    def __init__(self, config: TextConfig):
        super().__init__()
        width, self.num_heads = config.width, config.heads
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc_1, self.fc_2 = nn.Linear(width, 4 * width), zero_module(nn.Linear(4 * width, width))

    def forward(self, x: Float[Tensor, "n length width"]) -> Float[Tensor, "n length width"]:
        q, k, v = split_heads(self.qkv(self.ln_1(x)), self.num_heads, 3)
        x = x + self.proj(rearrange(attend(q, k, v), "n heads length d -> n length (heads d)"))
        return x + self.fc_2(F.gelu(self.fc_1(self.ln_2(x))))


class TextTransformer(nn.Module):
    """(tokens int64 [N, L], mask bool [N, L]) -> TextEncoding.

    Raises ValueError if the width cannot be divided among the heads.
    """

    def __init__(self, config: TextConfig, emb_channels: int):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"width {config.width} cannot be split into {config.heads} heads")
        length, width = config.context_length, config.width
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(length, width))
        self.padding_embedding = nn.Parameter(torch.empty(length, width))
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.layers))
        self.final_ln = nn.LayerNorm(width)
        self.proj = nn.Linear(width, emb_channels)
        # Token embeddings have standard deviation 1. Padding and positions start smaller, so that what the
        # caption says matters from the first step. Positions must not start too small: they alone distinguish
        # "a red circle left of a blue square" from "a blue circle left of a red square".
        nn.init.normal_(self.positional_embedding, std=0.3)
        nn.init.normal_(self.padding_embedding, std=0.02)
        # A long context is mostly padding, which all captions share. The bias subtracts the pooled embedding
        # of the empty caption, and the scale makes captions as different as lesson 3's class embeddings.
        nn.init.normal_(self.proj.weight, std=0.2 * length / width**0.5)
        with torch.no_grad():
            empty = self.transform(self.padding_embedding[None])[0, -1]
            self.proj.bias.copy_(-self.proj.weight @ empty)

    def forward(self, tokens: Int[Tensor, "n length"], mask: Bool[Tensor, "n length"]) -> TextEncoding:
        x = self.token_embedding(tokens) + self.positional_embedding
        x = self.transform(torch.where(mask[..., None], x, self.padding_embedding))
        # The last position, usually padding, has attended to all others and represents the whole caption.
        return TextEncoding(self.proj(x[:, -1]), x)

    def transform(self, x: Float[Tensor, "n length width"]) -> Float[Tensor, "n length width"]:
        """Apply all blocks and the final LayerNorm."""
        for block in self.blocks:
            x = block(x)
        return self.final_ln(x)
