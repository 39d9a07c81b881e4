"""diffusers' UNet2DModel at about the size of lesson 3's network. pip install diffusers"""

from diffusers import UNet2DModel
from torch import Tensor, nn


def build_network(image_shape: tuple[int, int, int]) -> nn.Module:
    channels, size, _ = image_shape
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=2 * channels,
        block_out_channels=(16, 32, 48, 64),
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
        norm_num_groups=4,
    )


def call(network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    return network(x_t, t).sample
