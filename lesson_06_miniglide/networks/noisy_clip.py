"""A small CLIP for noisy images, and guidance by it (Radford et al. 2021; GLIDE, section 2.4).

One network encodes images, one encodes captions; they are trained so that an image and its caption point in
the same direction. Because it is trained on x_t at every noise level, the gradient of its similarity can
guide a sampler to a caption. Its similarity also ranks finished samples (DALL-E: Ramesh et al. 2021).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from common.errors import UserError
from common.training.checkpoints import load_state, load_weights
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_03_adm.adm_unet import ADMConfig
from lesson_03_adm.classifier_guidance import GradientFn
from lesson_03_adm.noisy_classifier import NoisyClassifier
from lesson_04_text_conditioning.model import tokenizer_from_metadata
from lesson_04_text_conditioning.text_transformer import TextConfig, TextTransformer
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_06_miniglide.networks.presets import LESSON

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


def load_clip(checkpoint: str | Path, flag: str = "--clip") -> tuple[NoisyCLIP, CaptionTokenizer]:
    """Return a trained CLIP, frozen, and its tokenizer. Raises UserError, naming the flag.

    checkpoint: a .safetensors file or a run's folder. Its images are of 64x64 pixels if it has patches.
    """
    weights, metadata = load_weights(checkpoint, LESSON, flag)
    if "logit_scale" not in weights or "tokenizer" not in metadata:
        raise UserError(f"{flag} {checkpoint} is not a CLIP of this lesson")
    tokenizer = tokenizer_from_metadata(metadata)
    patches = weights["image_encoder.encoder.conv_in.weight"].shape[1] > 3
    clip = build_clip(tokenizer, CLIP_64_CONFIG if patches else CLIP_CONFIG)
    load_state(clip, weights, f"{flag} {checkpoint}")
    return clip.eval().requires_grad_(False), tokenizer


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


@torch.no_grad()
def embed_captions(clip: NoisyCLIP, tokenizer: Any, captions: Sequence[str]) -> Float[Tensor, "n width"]:
    """Return the unit vectors of captions, on the network's device."""
    tokens, mask = tokenizer.encode(captions)
    device = clip.logit_scale.device
    return clip.encode_text(tokens.to(device), mask.to(device))


@torch.no_grad()
def clip_similarity(
    clip: NoisyCLIP, tokenizer: Any, images: Float[Tensor, "n c h w"], captions: Sequence[str]
) -> Float[Tensor, "n"]:
    """Return the cosine similarity of each image without noise and its caption, on the CPU."""
    captions_embedded = embed_captions(clip, tokenizer, captions)
    parts = images.clamp(-1, 1).to(captions_embedded.device).split(250)
    images_embedded = torch.cat(
        [clip.encode_image(x, torch.zeros(len(x)).long().to(x.device)) for x in parts]
    )
    return (images_embedded * captions_embedded).sum(1).cpu()


def best_of(similarity: Float[Tensor, "n"], candidates: int, keep: int) -> Int[Tensor, "kept"]:
    """Return the indices of the `keep` most similar of every `candidates` successive samples, best first."""
    best = similarity.view(-1, candidates).topk(keep).indices
    return (best + candidates * torch.arange(len(best))[:, None]).flatten()
