"""ADM's classifier of images at any noise level (Dhariwal & Nichol 2021, section 4)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.layers import GroupNorm, attend
from common.protocols import Denoiser
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_01_ddpm.unet import UNetEncoder
from lesson_03_adm.adm_unet import (
    ADMConfig,
    MultiHeadAttention,
    ResBlock,
    pointwise_linear,
    res_down,
    split_heads,
)

CLASSIFIER_CONFIG = ADMConfig(channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4), num_head_channels=32)


class AttentionPool(nn.Module):
    """Pool [N, C, H, W] to [N, C] by attention whose only query is the mean of all positions (as in CLIP)."""

    def __init__(self, channels: int, num_positions: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.position = nn.Parameter(torch.randn(channels, num_positions + 1) / channels**0.5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = nn.Linear(channels, channels)

    def forward(self, h: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c"]:
        h = rearrange(h, "n c h w -> n (h w) c")
        h = torch.cat([h.mean(1, keepdim=True), h], 1) + self.position.T
        q, k, v = split_heads(pointwise_linear(self.qkv, h), self.num_heads, 3)
        pooled = attend(q[:, :, :1], k, v)
        return self.proj(rearrange(pooled, "n heads 1 d -> n (heads d)"))


class NoisyClassifier(nn.Module):
    """The encoder of an ADM UNet, pooled: (x_t [N, C, H, W], t [N]) -> logits [N, num_classes]."""

    def __init__(self, config: ADMConfig = CLASSIFIER_CONFIG, num_classes: int = 10):
        super().__init__()
        self.encoder = UNetEncoder(config, ResBlock, MultiHeadAttention, res_down)
        levels = self.encoder.level_channels
        channels = levels[-1]
        side = config.image_size // config.patch_size // 2 ** (len(levels) - 1)
        self.norm = GroupNorm(config.num_groups, channels)
        self.pool = AttentionPool(channels, side**2, config.num_heads_for(channels))
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]) -> Float[Tensor, "n classes"]:
        h, _, _ = self.encoder.encode(x_t, t)
        return self.head(F.silu(self.pool(F.silu(self.norm(h)))))


def loss_classifier(
    diffusion: GaussianDiffusion,
    classifier: Callable[[Tensor, Tensor], Tensor],
    x_0: Float[Tensor, "n c h w"],
    label: Int[Tensor, "n"],
) -> Float[Tensor, "n"]:
    """Return the cross entropy of the class predicted from x_t at a random t, for each sample."""
    t = torch.randint(diffusion.num_timesteps, (len(x_0),)).to(x_0.device)
    x_t = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    return F.cross_entropy(diffusion.predict(classifier, x_t, t), label, reduction="none")


def exact_classifier(
    diffusion: GaussianDiffusion, images: Float[Tensor, "m c h w"], labels: Int[Tensor, "m"]
) -> Denoiser:
    """Return the classifier (x_t, t) -> log p(x_t, y) + const, exact if these images are all the data.

    The density of a class is a mean of Gaussians, one around each image times sqrt(alpha_bar).
    """
    of_class = [images[labels == y].flatten(1) for y in range(int(labels.max()) + 1)]

    def classifier(x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]) -> Float[Tensor, "n classes"]:
        a = diffusion.extract(diffusion.alpha_bar, t, x_t).flatten(1)
        logits = []
        for data in of_class:  # without the square of x_t, which is the same for all classes
            exponents = (a.sqrt() * (x_t.flatten(1) @ data.T) - a * data.square().sum(1) / 2) / (1 - a)
            logits.append(exponents.logsumexp(1))
        return torch.stack(logits, 1)

    return classifier
