"""The DDPM UNet: sees a noisy image and the timestep, guesses the noise (Ho et al. 2020, appendix B)."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.command import cpu_has
from common.norm import GroupNorm
from common.resample import double

FEW_PLACES = 256  # to attend to


@dataclass(frozen=True)
class UNetConfig:
    """The network's settings, saved in every checkpoint."""

    image_size: int = 32
    in_channels: int = 1
    out_channels: int = 1
    num_channels: int = 32
    channel_mult: tuple[float, ...] = (1, 2, 2, 2)  # of num_channels, at full, half, quarter ... resolution
    num_res_blocks: int = 1  # at each resolution on the way down; one more on the way up
    attention_resolutions: tuple[int, ...] = (8,)  # in pixels
    groups: int = 4  # of GroupNorm

    @property
    def emb_channels(self):
        return 4 * self.num_channels


def timestep_embedding(t, width):
    """[cos, sin] of t at geometrically spaced frequencies from 1 to 1/10000 (Vaswani et al. 2017).

    t: [N] -> float [N, width]. width must be even.
    """
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1)


def zero(module):
    """Set a layer's parameters to zero: its branch then starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def conv(c_in, c_out, stride=1):
    return nn.Conv2d(c_in, c_out, 3, stride, padding=1)


def time_mlp(width):
    """The timestep's embedding, made fit for use: [N, width] -> [N, 4 width]."""
    return nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))


class ResBlock(nn.Module):
    """Two convolutions with the timestep's embedding between, and a skip: c_in to c_out channels."""

    def __init__(self, c_in, c_out, config):
        super().__init__()
        self.norm_1, self.conv_1 = GroupNorm(config.groups, c_in), conv(c_in, c_out)
        self.emb = nn.Linear(config.emb_channels, c_out)
        self.norm_2, self.conv_2 = GroupNorm(config.groups, c_out), zero(conv(c_out, c_out))
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb, context):
        h = self.conv_1(F.silu(self.norm_1(x)))
        h = h + self.emb(F.silu(emb))[:, :, None, None]
        h = self.conv_2(F.silu(self.norm_2(h)))
        return self.skip(x) + h


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v, each [N, ..., places, d]: values count more whose keys fit the query."""
    if suits_one_kernel(q):
        return F.scaled_dot_product_attention(q, k, v)
    if q.shape[-2] > FEW_PLACES:  # image by image: of all at once the tables of weights would fill the memory
        return torch.stack([weigh(*image) for image in zip(q, k, v)])
    return weigh(q, k, v)


def weigh(q, k, v):
    return (q / q.shape[-1] ** 0.5 @ k.mT).softmax(-1) @ v


def suits_one_kernel(q):
    """PyTorch's fused kernel is for GPUs, and in bf16 for CPUs with AMX while no gradient is asked for. On a
    CPU plain products are faster in bf16 else (by up to a half), and for a small table of weights."""
    if q.device.type != "cpu":
        return True
    if q.dtype == torch.bfloat16:
        return cpu_has("amx_tile") and not q.requires_grad
    return q.shape[-2] > FEW_PLACES


class Attention(nn.Module):
    """Every pixel looks at every pixel: one head of self-attention, and a skip."""

    def __init__(self, channels, config):
        super().__init__()
        self.norm = GroupNorm(config.groups, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = zero(nn.Conv1d(channels, channels, 1))

    def forward(self, x, emb, context):
        pixels = rearrange(self.norm(x), "n c h w -> n c (h w)")
        q, k, v = rearrange(self.qkv(pixels), "n (three c) pixels -> three n pixels c", three=3)
        attended = rearrange(attend(q, k, v), "n pixels c -> n c pixels")
        return x + self.proj(attended).view_as(x)


class Downsample(nn.Module):
    def __init__(self, channels, config):
        super().__init__()
        self.conv = conv(channels, channels, stride=2)

    def forward(self, x, emb, context):
        return self.conv(x)


class Upsample(nn.Module):
    def __init__(self, channels, config):
        super().__init__()
        self.conv = conv(channels, channels)

    def forward(self, x, emb, context):
        return self.conv(double(x))


class Layers(nn.ModuleList):
    """Layers in a row. Each is called as layer(x, emb, context) and takes of these what it needs."""

    def forward(self, x, emb, context):
        for layer in self:
            x = layer(x, emb, context)
        return x


class HalfUNet(nn.Module):
    """The way down, which halves the resolution level by level, and the middle.

    What the levels are built of can be replaced: a part is made by `res_block(c_in, c_out, config)`,
    `attention(channels, config)` and `downsample(channels, config)`.
    """

    def __init__(self, config, res_block=ResBlock, attention=Attention, downsample=Downsample):
        super().__init__()
        self.config = config
        self.levels = [int(mult * config.num_channels) for mult in config.channel_mult]
        self.time_mlp = time_mlp(config.num_channels)
        c = self.levels[0]
        self.first, self.kept = conv(config.in_channels, c), [c]  # channels of what is kept for the way up
        self.down = nn.ModuleList()
        for level, channels in enumerate(self.levels):
            for _ in range(config.num_res_blocks):
                self.down.append(self.block(level, c, channels, res_block, attention))
                self.kept.append(c := channels)
            if level < len(self.levels) - 1:
                self.down.append(Layers([downsample(c, config)]))
                self.kept.append(c)
        self.middle = Layers([res_block(c, c, config), attention(c, config), res_block(c, c, config)])

    def block(self, level, c_in, c_out, res_block, attention):
        """A residual block, and attention if this level has it."""
        layers = Layers([res_block(c_in, c_out, self.config)])
        if self.config.image_size // 2**level in self.config.attention_resolutions:
            layers.append(attention(c_out, self.config))
        return layers

    def descend(self, x_t, t, embedding, context):
        """(the middle's output, a stack of what was computed on the way, the timestep's embedding)."""
        emb = self.time_mlp(timestep_embedding(t, self.config.num_channels)) + embedding
        h = self.first(x_t)
        stack = [h]
        for layers in self.down:
            stack.append(h := layers(h, emb, context))
        return self.middle(h, emb, context), stack, emb


class UNet(HalfUNet):
    """(x_t [N, C, H, W], t [N]) -> [N, out_channels, H, W].

    The way up doubles the resolution again and joins on what the way down has kept. Later lessons give an
    `embedding` [N, emb_channels] to add to the timestep's, and a `context` that only the attention looks at.
    """

    def __init__(
        self, config, res_block=ResBlock, attention=Attention, downsample=Downsample, upsample=Upsample
    ):
        super().__init__(config, res_block, attention, downsample)
        kept, c = list(self.kept), self.levels[-1]
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(self.levels))):
            for _ in range(config.num_res_blocks + 1):
                self.up.append(self.block(level, c + kept.pop(), channels, res_block, attention))
                c = channels
            if level > 0:
                self.up[-1].append(upsample(c, config))
        norm = GroupNorm(config.groups, c)
        self.last = nn.Sequential(norm, nn.SiLU(), zero(conv(c, config.out_channels)))

    def forward(self, x_t, t, embedding=0, context=None):
        h, stack, emb = self.descend(x_t, t, embedding, context)
        for layers in self.up:
            h = layers(torch.cat([h, stack.pop()], 1), emb, context)
        return self.last(h)
