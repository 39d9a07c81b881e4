"""diffusers' UNet2DConditionModel at about the size of lesson 5's network. pip install diffusers

Every attention layer attends to 8 tokens of 64 channels, as in lesson 5. The token states are given, whereas
our network encodes its captions in each training step.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn


def build_network(image_shape: tuple[int, int, int]) -> nn.Module:
    channels, size, _ = image_shape
    return UNet2DConditionModel(
        sample_size=size,
        in_channels=channels,
        out_channels=2 * channels,
        block_out_channels=(24, 32, 48, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        cross_attention_dim=64,
        attention_head_dim=2,  # the number of heads, in spite of its name
        norm_num_groups=8,
    )


def call(network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    token_states = torch.zeros(len(x_t), 8, 64, dtype=x_t.dtype, device=x_t.device)
    return network(x_t, t, encoder_hidden_states=token_states).sample
