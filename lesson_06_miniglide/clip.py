"""A small CLIP that reads noisy pictures, and guidance by it (Radford et al. 2021; GLIDE, section 2.4).

One network embeds pictures, one captions; trained so that a picture and its own caption point the same way.
Trained on x_t at every noise level, its similarity has a gradient that can lead a sampler to the caption.
"""

import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lesson_03_adm.noisy_classifier import NoisyClassifier
from lesson_04_text_conditioning.text_transformer import TextTransformer
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_06_miniglide.patches import PATCH, cut

WIDTH = 64  # of the space in which pictures and captions meet


class NoisyCLIP(nn.Module):
    """image_config: ADMConfig of lesson 3's noisy classifier, whose classes become coordinates."""

    slow: ClassVar = TextUNet.slow  # for the same reason: colours are learned at once, digits hardly
    patch: ClassVar = 1  # pixels of a side

    def __init__(self, image_config, text_config, width=WIDTH):
        super().__init__()
        self.image, self.text = NoisyClassifier(image_config, width), TextTransformer(text_config, width)
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def embed_images(self, x_t, t):
        """[N, C, H, W], [N] -> unit vectors [N, width]."""
        return F.normalize(self.image(x_t, t).float(), dim=1)

    def embed_captions(self, tokens, mask):
        """[N, context] -> unit vectors [N, width]."""
        return F.normalize(self.text(tokens, mask).embedding.float(), dim=1)


class PatchCLIP(NoisyCLIP):
    """The same, its pictures cut into patches: image_config's in_channels are those of a patch."""

    patch: ClassVar = PATCH

    def embed_images(self, x_t, t):
        return super().embed_images(cut(x_t), t)


def loss_clip(diffusion, clip, x_0, tokens, mask):
    """Which of the batch's captions is this picture's, which of its pictures this caption's: [N].

    Captions that read the same are all right, in equal shares.
    """
    t = torch.randint(diffusion.num_timesteps, (len(x_0),)).to(x_0.device)
    x_t = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    images, captions = clip.embed_images(x_t, t), clip.embed_captions(tokens, mask)
    logits = clip.log_scale.exp() * images @ captions.T
    read = tokens.masked_fill(~mask, -1)
    same = (read[:, None] == read[None]).all(2).float()
    same = same / same.sum(1, keepdim=True)
    either_way = (F.cross_entropy(x, same, reduction="none") for x in (logits, logits.T))
    return sum(either_way) / 2


def clip_gradient(clip, captions, scale):
    """scale * the gradient of cos(picture, caption) with respect to x_t, for lesson 3's `guide_mean`.

    captions: unit vectors [N, width], one a sample.
    """

    def gradient(x_t, t):
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            similarity = (clip.embed_images(x_t, t) * captions).sum()
            return scale * torch.autograd.grad(similarity, x_t)[0]

    return gradient


@torch.no_grad()
def nearest_caption(diffusion, clip, x_0, captions, t):
    """Which of `captions` [K, width] is nearest to each picture, noised to timestep t: int64 [N]."""
    t = torch.full((len(x_0),), t)
    x_t = diffusion.q_sample(x_0, t, torch.randn_like(x_0))
    return (clip.embed_images(x_t, t.to(x_t.device)) @ captions.T).argmax(1)
