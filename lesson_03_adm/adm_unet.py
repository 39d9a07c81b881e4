"""The ADM UNet: lesson 1's UNet built of better parts (Dhariwal & Nichol 2021, section 3 and appendix A)."""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.norm import GroupNorm
from common.resample import double, halve
from lesson_01_ddpm.unet import Downsample, UNet, UNetConfig, Upsample, attend, conv, zero


@dataclass(frozen=True)
class ADMConfig(UNetConfig):
    attention_resolutions: tuple[int, ...] = (16, 8)
    num_heads: int = 1
    num_head_channels: int | None = None  # heads of this width; overrides num_heads
    scale_shift_norm: bool = True  # AdaGN: the embedding scales and shifts the normalised activations
    resblock_updown: bool = True  # BigGAN: residual blocks change the resolution
    dropout: float = 0.0

    def heads(self, channels):
        """Heads of an attention layer. Raises ValueError if the channels cannot be shared out."""
        heads = channels // self.num_head_channels if self.num_head_channels else self.num_heads
        width = self.num_head_channels or channels // heads
        if heads * width != channels:
            raise ValueError(f"{channels} channels cannot be cut into heads of {width}")
        return heads


class ResBlock(nn.Module):
    """Lesson 1's residual block with AdaGN, dropout, and where asked for a change of resolution inside."""

    def __init__(self, c_in, c_out, config, resample=None):
        super().__init__()
        self.scale_shift_norm, self.resample = config.scale_shift_norm, resample
        self.norm_1, self.conv_1 = GroupNorm(config.groups, c_in), conv(c_in, c_out)
        self.emb = nn.Linear(config.emb_channels, 2 * c_out if config.scale_shift_norm else c_out)
        self.norm_2, self.dropout = GroupNorm(config.groups, c_out), nn.Dropout(config.dropout)
        self.conv_2 = zero(conv(c_out, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb, context):
        h = F.silu(self.norm_1(x))
        if self.resample:  # both branches, before any convolution
            h, x = self.resample(h), self.resample(x)
        h = self.conv_1(h)
        emb = self.emb(F.silu(emb))[:, :, None, None]
        if self.scale_shift_norm:
            scale, shift = emb.chunk(2, 1)
            h = self.norm_2(h, 1 + scale, shift)
        else:
            h = self.norm_2(h + emb)
        return self.skip(x) + self.conv_2(self.dropout(F.silu(h)))


def res_down(channels, config):
    return ResBlock(channels, channels, config, resample=halve)


def res_up(channels, config):
    return ResBlock(channels, channels, config, resample=double)


class MultiHeadAttention(nn.Module):
    """Self-attention in several heads. Subclasses may add keys and values that come from the context."""

    def __init__(self, channels, config):
        super().__init__()
        self.heads = config.heads(channels)
        self.norm = GroupNorm(config.groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)  # head by head: its q, its k, its v
        self.proj = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x, emb, context):
        q, k, v = self.of_pixels(x)
        k, v = self.look_further(k, v, context)
        attended = attend(q, k, v)
        attended = at_places(self.proj, rearrange(attended, "n heads pixels d -> n pixels (heads d)"))
        return x + rearrange(attended, "n (h w) c -> n c h w", h=x.shape[2])

    def of_pixels(self, x):
        """The pixels' queries, keys and values, each [N, heads, pixels, d]."""
        pixels = rearrange(self.norm(x), "n c h w -> n (h w) c")
        return split_heads(at_places(self.qkv, pixels), self.heads, 3)

    def look_further(self, k, v, context):
        """The keys and values to attend to, [N, heads, places, d]: here the image's own."""
        return k, v


def at_places(conv, x):
    """A convolution of width 1 as what it is, a linear map at every place: [N, places, C_in] -> [..., C_out].

    With the channels last the heads' vectors are contiguous, as fused attention wants them.
    """
    return F.linear(x, conv.weight.squeeze(2), conv.bias)


def split_heads(x, heads, parts):
    """[N, places, heads * parts * d] -> `parts` tensors [N, heads, places, d]."""
    return rearrange(x, "n places (heads parts d) -> parts n heads places d", heads=heads, parts=parts)


def adm_unet(config, attention=MultiHeadAttention):
    """Lesson 1's UNet of ADM's parts; `attention(channels, config)` makes the attention layers."""
    down, up = (res_down, res_up) if config.resblock_updown else (Downsample, Upsample)
    return UNet(config, ResBlock, attention, down, up)


class ClassUNet(nn.Module):
    """An ADM UNet that is told a class: (x_t [N, C, H, W], t [N], y [N]) -> [N, out_channels, H, W]."""

    def __init__(self, config, num_classes=10):
        super().__init__()
        self.unet = adm_unet(config)
        self.class_embedding = nn.Embedding(num_classes, config.emb_channels)

    def forward(self, x_t, t, y):
        return self.unet(x_t, t, embedding=self.class_embedding(y))
