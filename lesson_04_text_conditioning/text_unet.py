"""GLIDE's UNet: lesson 3's ADM UNet with a caption in its embedding and in every attention layer."""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from lesson_03_adm.adm_unet import (
    ADMConfig,
    MultiHeadAttention,
    build_adm_unet,
    pointwise_linear,
    split_heads,
)
from lesson_04_text_conditioning.text_transformer import TextEncoding


class TextAttention(MultiHeadAttention):
    """Attention of every position to all positions and all tokens, padding included, in one softmax."""

    def __init__(self, channels: int, config: ADMConfig, text_width: int):
        super().__init__(channels, config)
        self.text_kv = nn.Conv1d(text_width, 2 * channels, 1)  # head by head: its k, its v

    def extend_kv(
        self, k: Tensor, v: Tensor, context: Float[Tensor, "n length width"]
    ) -> tuple[Tensor, Tensor]:
        """Prepend the keys and values of the tokens. context: the text encoder's token states."""
        text_k, text_v = self.project_text(context)
        return torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)

    def project_text(self, context: Float[Tensor, "n length width"]) -> tuple[Tensor, Tensor]:
        """Return the tokens' keys and values, each [N, heads, L, d]."""
        text_k, text_v = split_heads(pointwise_linear(self.text_kv, context), self.num_heads, 2)
        return text_k, text_v


def resize_to(
    x_t: Float[Tensor, "n c h w"], low_res: Float[Tensor, "n c_2 h_2 w_2"]
) -> Float[Tensor, "n c_2 h w"]:
    """Resize low_res bilinearly to the resolution of x_t."""
    if low_res.shape[2:] == x_t.shape[2:]:
        return low_res
    return F.interpolate(low_res, x_t.shape[2:], mode="bilinear", align_corners=False)


class TextUNet(nn.Module):
    """(x_t [N, C, H, W], t [N], text TextEncoding) -> [N, out_channels, H, W].

    config: its in_channels count those of x_t only. text_config: a TextConfig, or another object with
    `build_encoder(emb_channels)` and `width`. inpaint: the network also sees the known pixels and their mask.
    upsample: it also sees a low-resolution image. Both are further input channels, as in GLIDE.
    """

    def __init__(self, config: ADMConfig, text_config: Any, inpaint: bool = False, upsample: bool = False):
        super().__init__()
        self.config, self.text_config, self.inpaint, self.upsample = config, text_config, inpaint, upsample
        c = config.in_channels
        in_channels = c + (c + 1) * inpaint + c * upsample
        self.text_encoder = text_config.build_encoder(config.emb_channels)
        self.unet = build_adm_unet(
            replace(config, in_channels=in_channels),
            attention=lambda channels, config: TextAttention(channels, config, text_config.width),
        )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t."""
        return (self.config.in_channels, self.config.image_size, self.config.image_size)

    def encode_text(self, tokens: Tensor, mask: Bool[Tensor, "n length"]) -> TextEncoding:
        """Encode captions; this is needed once per prompt, not once per step."""
        return self.text_encoder(tokens, mask)

    def forward(
        self,
        x_t: Float[Tensor, "n c h w"],
        t: Int[Tensor, "n"],
        text: TextEncoding,
        inpaint_image: Float[Tensor, "n c h w"] | None = None,
        inpaint_mask: Float[Tensor, "n 1 h w"] | None = None,
        low_res: Float[Tensor, "n c h_2 w_2"] | None = None,
    ) -> Float[Tensor, "n out_c h w"]:
        """inpaint_mask is 1 where inpaint_image is known; without an image, nothing is known."""
        inputs = [x_t]
        if self.inpaint:
            if inpaint_image is None or inpaint_mask is None:
                inpaint_image, inpaint_mask = torch.zeros_like(x_t), torch.zeros_like(x_t[:, :1])
            inputs += [inpaint_image * inpaint_mask, inpaint_mask]
        if self.upsample:
            assert low_res is not None, "an upsampler needs low_res"
            inputs.append(resize_to(x_t, low_res))
        return self.unet(torch.cat(inputs, 1), t, embedding=text.pooled, context=text.token_states)
