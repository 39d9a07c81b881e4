"""A small CLIP for noisy images, and guidance by it (Radford et al. 2021; GLIDE, section 2.4).

One network encodes images, one encodes captions; they are trained so that an image and its caption point in
the same direction. Because it is trained on x_t at every noise level, the gradient of its similarity can
guide a sampler to a caption.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_03_adm.adm_unet import ADMConfig
from lesson_03_adm.classifier_guidance import GradientFn
from lesson_03_adm.noisy_classifier import NoisyClassifier
from lesson_04_text_conditioning.text_transformer import TextConfig, TextTransformer

WIDTH = 64  # dimensions of the space that images and captions share
CLIP_CONFIG = ADMConfig(in_channels=3, channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4))
CLIP_64_CONFIG = replace(CLIP_CONFIG, image_size=64, patch_size=2)  # for images of 64x64 pixels
# At the full rate CLIP learns colours at once and digits hardly at all; see lesson 4's LR_SCALES.
LR_SCALES: Mapping[str, float] = {"text_encoder.": 0.03}


class NoisyCLIP(nn.Module):
    """Two encoders into one space; the logits of lesson 3's NoisyClassifier become coordinates."""

    def __init__(self, image_config: ADMConfig, text_config: TextConfig, width: int = WIDTH):
        super().__init__()
        self.image_encoder = NoisyClassifier(image_config, width)
        self.text_encoder = TextTransformer(text_config, width)
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]) -> Float[Tensor, "n width"]:
        """Return unit vectors of noisy images."""
        return F.normalize(self.image_encoder(x_t, t).float(), dim=1)

    def encode_text(
        self, tokens: Int[Tensor, "n length"], mask: Bool[Tensor, "n length"]
    ) -> Float[Tensor, "n width"]:
        """Return unit vectors of captions."""
        return F.normalize(self.text_encoder(tokens, mask).pooled.float(), dim=1)


def build_clip(tokenizer: Any, image_config: ADMConfig = CLIP_CONFIG) -> NoisyCLIP:
    """Return an untrained CLIP for captions of this tokenizer."""
    return NoisyCLIP(image_config, TextConfig(tokenizer.vocab_size, tokenizer.context_length))


def loss_clip(
    diffusion: GaussianDiffusion,
    clip: NoisyCLIP,
    x_0: Float[Tensor, "n c h w"],
    tokens: Int[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
) -> Float[Tensor, "n"]:
    """Return the cross entropy of finding each image's caption in the batch, and each caption's image.

    Equal captions are all correct and share the probability. t is uniform.
    """
    t = torch.randint(diffusion.num_timesteps, (len(x_0),)).to(x_0.device)
    x_t = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    images, captions = clip.encode_image(x_t, t), clip.encode_text(tokens, mask)
    logits = clip.logit_scale.exp() * images @ captions.T
    read = tokens.masked_fill(~mask, -1)
    same = (read[:, None] == read[None]).all(2).float()
    target = same / same.sum(1, keepdim=True)
    of_images = F.cross_entropy(logits, target, reduction="none")
    of_captions = F.cross_entropy(logits.T, target, reduction="none")
    return (of_images + of_captions) / 2


def clip_gradient(clip: NoisyCLIP, captions: Float[Tensor, "n width"], scale: float) -> GradientFn:
    """Return a function for scale * grad cos(image, caption) with respect to x_t, for `condition_mean`.

    captions: unit vectors, one per sample.
    """

    def gradient(x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]) -> Float[Tensor, "n c h w"]:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            similarity = (clip.encode_image(x_t, t) * captions).sum()
            return scale * torch.autograd.grad(similarity, x_t)[0]

    return gradient


@torch.no_grad()
def nearest_caption(
    diffusion: GaussianDiffusion,
    clip: NoisyCLIP,
    x_0: Float[Tensor, "n c h w"],
    captions: Float[Tensor, "k width"],
    t: int,
) -> Int[Tensor, "n"]:
    """Return which of k captions is most similar to each image with the noise of timestep t."""
    timesteps = torch.full((len(x_0),), t)
    x_t = diffusion.q_sample(x_0, timesteps, torch.randn_like(x_0))
    return (clip.encode_image(x_t, timesteps.to(x_t.device)) @ captions.T).argmax(1)
