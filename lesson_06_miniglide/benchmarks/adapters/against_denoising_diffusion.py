"""denoising-diffusion-pytorch's Unet at about the size of lesson 3's network.

For images in colour it has about the size of lesson 5's network. pip install denoising-diffusion-pytorch
"""

from denoising_diffusion_pytorch import Unet
from torch import Tensor, nn


def build_network(image_shape: tuple[int, int, int]) -> nn.Module:
    channels = image_shape[0]
    dim = 16 if channels == 1 else 20
    return Unet(dim, dim_mults=(1, 2, 2, 6), channels=channels, out_dim=2 * channels, flash_attn=True)


def call(network: nn.Module, x_t: Tensor, t: Tensor) -> Tensor:
    return network(x_t, t)
