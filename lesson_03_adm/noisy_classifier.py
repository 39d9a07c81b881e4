"""ADM's classifier, which reads digits at any noise level (Dhariwal & Nichol 2021, section 4)."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from common.norm import GroupNorm
from lesson_01_ddpm.unet import HalfUNet, attend
from lesson_03_adm.adm_unet import ADMConfig, MultiHeadAttention, ResBlock, at_places, res_down, split_heads

NETWORK = ADMConfig(channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4), num_head_channels=32)


class AttentionPool(nn.Module):
    """One query, the mean of all places, looks at every place: [N, C, H, W] -> [N, C] (CLIP's pooling)."""

    def __init__(self, channels, places, heads):
        super().__init__()
        self.heads = heads
        self.position = nn.Parameter(torch.randn(channels, places + 1) / channels**0.5)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj = nn.Linear(channels, channels)

    def forward(self, h):
        h = rearrange(h, "n c h w -> n (h w) c")
        h = torch.cat([h.mean(1, keepdim=True), h], 1) + self.position.T
        q, k, v = split_heads(at_places(self.qkv, h), self.heads, 3)
        pooled = attend(q[:, :, :1], k, v)
        return self.proj(rearrange(pooled, "n heads 1 d -> n (heads d)"))


class NoisyClassifier(nn.Module):
    """The way down of the ADM UNet, pooled: (x_t [N, C, H, W], t [N]) -> logits [N, num_classes]."""

    def __init__(self, config=NETWORK, num_classes=10):
        super().__init__()
        self.encoder = HalfUNet(config, ResBlock, MultiHeadAttention, res_down)
        channels = self.encoder.levels[-1]
        places = (config.image_size // 2 ** (len(self.encoder.levels) - 1)) ** 2
        self.norm = GroupNorm(config.groups, channels)
        self.pool = AttentionPool(channels, places, config.heads(channels))
        self.head = nn.Linear(channels, num_classes)

    def forward(self, x_t, t):
        h, _, _ = self.encoder.descend(x_t, t, embedding=0, context=None)
        return self.head(F.silu(self.pool(F.silu(self.norm(h)))))


def loss_classifier(diffusion, classifier, x_0, label):
    """Cross entropy of the classes read from x_t at a random t, as guidance will ask for them: [N]."""
    t = torch.randint(diffusion.num_timesteps, (len(x_0),)).to(x_0.device)
    x_t = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    return F.cross_entropy(diffusion.ask(classifier, x_t, t), label, reduction="none")
