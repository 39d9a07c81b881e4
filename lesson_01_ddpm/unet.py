"""The DDPM UNet: predicts the noise in x_t, given x_t and the timestep (Ho et al. 2020, appendix B)."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.layers import GroupNorm, attend, upsample_nearest_2x

MakeLayer = Callable[..., nn.Module]
Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class UNetConfig:
    """Settings of a UNet, saved in every checkpoint."""

    image_size: int = 32
    in_channels: int = 1
    out_channels: int = 1
    num_channels: int = 32
    # times num_channels, at full, half, quarter ... resolution
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)
    num_res_blocks: int = 1  # per resolution in the encoder; the decoder has one more
    attention_resolutions: tuple[int, ...] = (8,)  # feature-map sizes at which there is attention
    num_groups: int = 4  # of GroupNorm
    patch_size: int = 1  # pixels per side that enter the network as one position; larger only in lesson 6

    @property
    def emb_channels(self) -> int:
        return 4 * self.num_channels


def timestep_embedding(t: Int[Tensor, "n"], width: int) -> Float[Tensor, "n {width}"]:
    """Return [cos, sin] of t at geometrically spaced frequencies, 1 down to 1/10000 (Vaswani et al. 2017).

    width must be even.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero_module(module: Module) -> Module:
    """Set a layer's parameters to zero, so that its residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv3x3(c_in: int, c_out: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1)


def time_mlp(width: int) -> nn.Sequential:
    """Return the MLP that processes the timestep embedding: [N, width] -> [N, 4 width]."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


class ResBlock(nn.Module):
    """Two convolutions with the timestep embedding added in between, and a skip connection."""

    def __init__(self, c_in: int, c_out: int, config: UNetConfig):
        super().__init__()
        self.norm_1, self.conv_1 = GroupNorm(config.num_groups, c_in), conv3x3(c_in, c_out)
        self.emb = nn.Linear(config.emb_channels, c_out)
        self.norm_2, self.conv_2 = GroupNorm(config.num_groups, c_out), zero_module(conv3x3(c_out, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(
        self, x: Float[Tensor, "n c_in h w"], emb: Float[Tensor, "n emb"], context: Any
    ) -> Float[Tensor, "n c_out h w"]:
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.skip(x) + h


class AttentionBlock(nn.Module):
    """Self-attention with one head among all positions, and a skip connection."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.norm = GroupNorm(config.num_groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = zero_module(nn.Conv1d(channels, channels, 1))

    def forward(
        self, x: Float[Tensor, "n c h w"], emb: Float[Tensor, "n emb"], context: Any
    ) -> Float[Tensor, "n c h w"]:
        positions = rearrange(self.norm(x), "n c h w -> n c (h w)")
        q, k, v = rearrange(self.qkv(positions), "n (three c) positions -> three n positions c", three=3)
        attended = rearrange(attend(q, k, v), "n positions c -> n c positions")
        return x + self.proj(attended).view_as(x)


class Downsample(nn.Module):
    """Halve the resolution by a convolution of stride 2."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.conv = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor, emb: Tensor, context: Any) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double the resolution by repeating pixels, then convolve."""

    def __init__(self, channels: int, config: UNetConfig):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor, emb: Tensor, context: Any) -> Tensor:
        return self.conv(upsample_nearest_2x(x))


class TimestepEmbedSequential(nn.ModuleList):
    """Layers in sequence, each called as layer(x, emb, context), of which it uses what it needs."""

    def forward(self, x: Tensor, emb: Tensor, context: Any) -> Tensor:
        for layer in self:
            x = layer(x, emb, context)
        return x


class UNetEncoder(nn.Module):
    """The first half of a UNet: levels of halving resolution, and the middle.

    The parts of which it is built can be replaced; they are called as `res_block(c_in, c_out, config)`,
    `attention(channels, config)` and `downsample(channels, config)`.
    """

    def __init__(
        self,
        config: UNetConfig,
        res_block: MakeLayer = ResBlock,
        attention: MakeLayer = AttentionBlock,
        downsample: MakeLayer = Downsample,
    ):
        super().__init__()
        self.config = config
        self.level_channels = [int(mult * config.num_channels) for mult in config.channel_mult]
        self.time_mlp = time_mlp(config.num_channels)
        c = self.level_channels[0]
        self.conv_in = conv3x3(config.in_channels * config.patch_size**2, c)
        self.skip_channels = [c]  # of the feature maps that the decoder will receive
        self.down = nn.ModuleList()
        for level, channels in enumerate(self.level_channels):
            for _ in range(config.num_res_blocks):
                self.down.append(self.block(level, c, channels, res_block, attention))
                self.skip_channels.append(c := channels)
            if level < len(self.level_channels) - 1:
                self.down.append(TimestepEmbedSequential([downsample(c, config)]))
                self.skip_channels.append(c)
        self.middle = TimestepEmbedSequential(
            [res_block(c, c, config), attention(c, config), res_block(c, c, config)]
        )

    def block(
        self, level: int, c_in: int, c_out: int, res_block: MakeLayer, attention: MakeLayer
    ) -> TimestepEmbedSequential:
        """Return a residual block, followed by attention if this level has it."""
        layers = TimestepEmbedSequential([res_block(c_in, c_out, self.config)])
        size = self.config.image_size // self.config.patch_size // 2**level
        if size in self.config.attention_resolutions:
            layers.append(attention(c_out, self.config))
        return layers

    def encode(
        self,
        x_t: Float[Tensor, "n c h w"],
        t: Int[Tensor, "n"],
        embedding: Tensor | float = 0.0,
        context: Any = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return the middle's output, the stack of feature maps for the decoder, and the embedding of t."""
        emb = self.time_mlp(timestep_embedding(t, self.config.num_channels)) + embedding
        h = self.conv_in(F.pixel_unshuffle(x_t, self.config.patch_size))
        skips = [h]
        for layers in self.down:
            skips.append(h := layers(h, emb, context))
        return self.middle(h, emb, context), skips, emb


class UNet(UNetEncoder):
    """(x_t [N, C, H, W], t [N]) -> output [N, out_channels, H, W].

    The decoder doubles the resolution level by level and concatenates the encoder's feature maps. Later
    lessons pass an `embedding` [N, emb_channels] to add to that of t, and a `context` for the attention.
    """

    def __init__(
        self,
        config: UNetConfig,
        res_block: MakeLayer = ResBlock,
        attention: MakeLayer = AttentionBlock,
        downsample: MakeLayer = Downsample,
        upsample: MakeLayer = Upsample,
    ):
        super().__init__(config, res_block, attention, downsample)
        skip_channels, c = list(self.skip_channels), self.level_channels[-1]
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(self.level_channels))):
            for i in range(config.num_res_blocks + 1):
                layers = self.block(level, c + skip_channels.pop(), channels, res_block, attention)
                c = channels
                if level > 0 and i == config.num_res_blocks:
                    layers.append(upsample(c, config))
                self.up.append(layers)
        self.conv_out = nn.Sequential(
            GroupNorm(config.num_groups, c),
            nn.SiLU(),
            zero_module(conv3x3(c, config.out_channels * config.patch_size**2)),
        )

    def forward(
        self,
        x_t: Float[Tensor, "n c h w"],
        t: Int[Tensor, "n"],
        embedding: Tensor | float = 0.0,
        context: Any = None,
    ) -> Float[Tensor, "n out_c h w"]:
        h, skips, emb = self.encode(x_t, t, embedding, context)
        for layers in self.up:
            h = layers(torch.cat([h, skips.pop()], 1), emb, context)
        return F.pixel_shuffle(self.conv_out(h), self.config.patch_size)
