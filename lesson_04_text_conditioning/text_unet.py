"""An ADM UNet that reads: lesson 3's network, with text among the keys and values of its attention."""

from dataclasses import replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from lesson_03_adm.adm_unet import MultiHeadAttention, adm_unet, at_places, split_heads


class TextAttention(MultiHeadAttention):
    """Every pixel looks at every pixel and at every token, padding included, in one softmax (GLIDE's way)."""

    def __init__(self, channels, config, text_width):
        super().__init__(channels, config)
        self.text_kv = nn.Conv1d(text_width, 2 * channels, 1)  # head by head: its k, its v
        self.kept = None  # while sampling: the text, its keys and values

    def look_further(self, k, v, context):
        text_k, text_v = self.keys_and_values(context)
        return torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)

    def keys_and_values(self, context):
        """The text's. Sampling asks with one text at every step: they are kept until another comes."""
        if self.kept and self.kept[0] is context and not torch.is_grad_enabled():
            return self.kept[1]
        text_kv = split_heads(at_places(self.text_kv, context), self.heads, 2)
        self.kept = None if torch.is_grad_enabled() else (context, text_kv)
        return text_kv


def as_large_as(x_t, low_res):
    """low_res [N, C, h, w] at x_t's resolution, between its pixels a mean of them."""
    if low_res.shape[2:] == x_t.shape[2:]:
        return low_res
    return F.interpolate(low_res, x_t.shape[2:], mode="bilinear", align_corners=False)


class TextUNet(nn.Module):
    """(x_t [N, C, H, W], t [N], text) -> [N, out_channels, H, W], text being `encode_text`'s.

    config: ADMConfig, whose in_channels count x_t's alone. With `inpaint`, the network also sees the known
    pixels and the mask; with `upsample`, an image of lower resolution.
    """

    # For common.training: while the captions' code keeps changing, it is hardly learned.
    slow: ClassVar = {"text": 0.03}

    def __init__(self, config, text_config, inpaint=False, upsample=False):
        super().__init__()
        self.config, self.text_config, self.inpaint, self.upsample = config, text_config, inpaint, upsample
        c = config.in_channels
        seen = c + (c + 1) * inpaint + c * upsample
        self.text = text_config.new_encoder(config.emb_channels)
        self.unet = adm_unet(
            replace(config, in_channels=seen),
            attention=lambda channels, config: TextAttention(channels, config, text_config.width),
        )

    @property
    def image_shape(self):
        """(C, H, W) of x_t."""
        return (self.config.in_channels, self.config.image_size, self.config.image_size)

    def encode_text(self, tokens, mask):
        """Once a prompt, not once a step. tokens, mask: [N, context]."""
        return self.text(tokens, mask)

    def forward(self, x_t, t, text, image=None, mask=None, low_res=None):
        """image: [N, C, H, W]; mask: [N, 1, H, W], 1 where the image is known; low_res: [N, C, h, w]."""

        seen = [x_t]
        if self.inpaint:
            nothing_known = image is None
            mask = x_t.new_zeros(len(x_t), 1, *x_t.shape[2:]) if nothing_known else mask
            seen += [torch.zeros_like(x_t) if nothing_known else image * mask, mask]
        if self.upsample:
            seen.append(as_large_as(x_t, low_res))
        return self.unet(torch.cat(seen, 1), t, embedding=text.embedding, context=text.states)
