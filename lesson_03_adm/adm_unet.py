"""The ADM UNet: lesson 1's UNet with better parts (Dhariwal & Nichol 2021, section 3 and appendix A)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.layers import GroupNorm, attend, avg_pool_2x, upsample_nearest_2x
from lesson_01_ddpm.unet import Downsample, MakeLayer, UNet, UNetConfig, Upsample, conv3x3, zero_module


@dataclass(frozen=True)
class ADMConfig(UNetConfig):
    """Settings of an ADM UNet, saved in every checkpoint."""

    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 1
    num_head_channels: int | None = None  # channels per attention head; overrides num_heads
    scale_shift_norm: bool = True  # AdaGN: the embedding scales and shifts the normalized activations
    resblock_updown: bool = True  # BigGAN: residual blocks change the resolution
    dropout: float = 0.0

    def num_heads_for(self, channels: int) -> int:
        """Return how many heads an attention layer has. Raises ValueError if the channels do not divide."""
        heads = channels // self.num_head_channels if self.num_head_channels else self.num_heads
        width = self.num_head_channels or channels // heads
        if heads * width != channels:
            raise ValueError(f"{channels} channels cannot be split into heads of {width}")
        return heads


class ResBlock(nn.Module):
    """Lesson 1's residual block with AdaGN, dropout, and an optional change of resolution inside.

    resample: applied in both branches, before any convolution.
    """

    def __init__(
        self, c_in: int, c_out: int, config: ADMConfig, resample: Callable[[Tensor], Tensor] | None = None
    ):
        super().__init__()
        self.scale_shift_norm, self.resample = config.scale_shift_norm, resample
        self.norm_1, self.conv_1 = GroupNorm(config.num_groups, c_in), conv3x3(c_in, c_out)
        self.emb = nn.Linear(config.emb_channels, 2 * c_out if config.scale_shift_norm else c_out)
        self.norm_2, self.dropout = GroupNorm(config.num_groups, c_out), nn.Dropout(config.dropout)
        self.conv_2 = zero_module(conv3x3(c_out, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Float[Tensor, "n c_in h w"], emb: Float[Tensor, "n emb"], context: Any) -> Tensor:
        h = F.silu(self.norm_1(x))
        if self.resample:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_1(h)
        emb = self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = emb.chunk(2, 1)
            h = self.norm_2(h) * (1 + scale) + shift
        else:
            h = self.norm_2(h + emb)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


def res_down(channels: int, config: ADMConfig) -> ResBlock:
    """Return a residual block that halves the resolution."""
    return ResBlock(channels, channels, config, resample=avg_pool_2x)


def res_up(channels: int, config: ADMConfig) -> ResBlock:
    """Return a residual block that doubles the resolution."""
    return ResBlock(channels, channels, config, resample=upsample_nearest_2x)


class MultiHeadAttention(nn.Module):
    """Self-attention in several heads, and a skip connection. Lesson 4 adds keys and values of the text."""

    def __init__(self, channels: int, config: ADMConfig):
        super().__init__()
        self.num_heads = config.num_heads_for(channels)
        self.norm = GroupNorm(config.num_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)  # head by head: its q, its k, its v
        self.proj = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(
        self, x: Float[Tensor, "n c h w"], emb: Float[Tensor, "n emb"], context: Any
    ) -> Float[Tensor, "n c h w"]:
        q, k, v = self.project_qkv(x)
        k, v = self.extend_kv(k, v, context)
        attended = rearrange(attend(q, k, v), "n heads positions d -> n positions (heads d)")
        projected = pointwise_linear(self.proj, attended)
        return x + rearrange(projected, "n (h w) c -> n c h w", h=x.shape[2])

    def project_qkv(self, x: Float[Tensor, "n c h w"]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the positions' queries, keys and values, each [N, heads, positions, d]."""
        positions = rearrange(self.norm(x), "n c h w -> n (h w) c")
        q, k, v = split_heads(pointwise_linear(self.qkv, positions), self.num_heads, 3)
        return q, k, v

    def extend_kv(self, k: Tensor, v: Tensor, context: Any) -> tuple[Tensor, Tensor]:
        """Return the keys and values to attend to, [N, heads, positions, d]; here the image's own."""
        return k, v


def pointwise_linear(
    conv: nn.Conv1d, x: Float[Tensor, "n positions c_in"]
) -> Float[Tensor, "n positions c_out"]:
    """Apply a convolution of width 1 as a linear map, with the channels last.

    The published checkpoints store these layers as Conv1d. With the channels last the vectors of a head are
    contiguous, as fused attention kernels require.
    """
    return F.linear(x, conv.weight.squeeze(2), conv.bias)


def split_heads(
    x: Float[Tensor, "n positions c"], num_heads: int, parts: int
) -> Float[Tensor, "parts n {num_heads} positions d"]:
    """Split [N, positions, heads * parts * d] into `parts` tensors [N, heads, positions, d], stacked."""
    return rearrange(
        x, "n positions (heads parts d) -> parts n heads positions d", heads=num_heads, parts=parts
    )


def build_adm_unet(config: ADMConfig, attention: MakeLayer = MultiHeadAttention) -> UNet:
    """Build lesson 1's UNet from ADM's parts. attention: (channels, config) -> attention layer."""
    down, up = (res_down, res_up) if config.resblock_updown else (Downsample, Upsample)
    return UNet(config, ResBlock, attention, down, up)


class ClassConditionalUNet(nn.Module):
    """An ADM UNet conditioned on a class: (x_t [N, C, H, W], t [N], y [N]) -> [N, out_channels, H, W]."""

    def __init__(self, config: ADMConfig, num_classes: int = 10):
        super().__init__()
        self.unet = build_adm_unet(config)
        self.class_embedding = nn.Embedding(num_classes, config.emb_channels)

    def forward(
        self, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"], y: Int[Tensor, "n"]
    ) -> Float[Tensor, "n out_c h w"]:
        return self.unet(x_t, t, embedding=self.class_embedding(y))
