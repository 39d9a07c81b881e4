"""The second half of a cascade: a network that draws a large image from a small one (Ho et al. 2022).

When it is used, its input is not a downsampled photo but another network's sample, with faults that no photo
has. So in training the low-resolution image gets noise, and the network also gets its level. It learns not to
trust every detail. This is noise conditioning augmentation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from lesson_01_ddpm.diffusion import GaussianDiffusion, gaussian_noise
from lesson_01_ddpm.unet import time_mlp, timestep_embedding, zero_module
from lesson_04_text_conditioning.text_transformer import TextEncoding

FACTOR = 4  # an upsampler makes each side this many times as long
LOW_RES = 16  # pixels, of images of 64x64


class NoiseLevelConditioning(nn.Module):
    """Wrap an upsampling network, so that it is also told the noise level of its low-resolution input.

    (x_t, t, text, low_res, noise_level [N]) -> output. The level is a timestep. It is embedded as t is, and
    added to the pooled text embedding.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.width = network.config.num_channels  # type: ignore[union-attr]
        self.noise_level_mlp = time_mlp(self.width)  # type: ignore[arg-type]
        zero_module(self.noise_level_mlp[-1])

    def forward(
        self,
        x_t: Float[Tensor, "n c h w"],
        t: Int[Tensor, "n"],
        text: TextEncoding,
        low_res: Float[Tensor, "n c h_2 w_2"],
        noise_level: Int[Tensor, "n"],
    ) -> Float[Tensor, "n out_c h w"]:
        text = text._replace(pooled=text.pooled + self.embed_level(noise_level))
        return self.network(x_t, t, text, low_res=low_res)

    def embed_level(self, noise_level: Int[Tensor, "n"]) -> Float[Tensor, "n emb_channels"]:
        """Return what is added to the pooled text embedding."""
        return self.noise_level_mlp(timestep_embedding(noise_level, self.width))  # type: ignore[arg-type]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.image_shape  # type: ignore[return-value]

    def encode_text(self, tokens: Tensor, mask: Tensor) -> TextEncoding:
        """Encode captions by the wrapped network."""
        return self.network.encode_text(tokens, mask)  # type: ignore[operator]


def area_downsample(images: Float[Tensor, "n c h w"], size: int) -> Float[Tensor, "n c {size} {size}"]:
    """Downsample images; each pixel is the mean of the pixels it covers.

    Raises ValueError unless `size` divides both sides.
    """
    if images.shape[2] % size or images.shape[3] % size:
        raise ValueError(f"{tuple(images.shape[2:])} pixels cannot be divided into {size} x {size} areas")
    return F.interpolate(images, (size, size), mode="area")


def noise_augment(
    diffusion: GaussianDiffusion,
    low_res: Float[Tensor, "n c h w"],
    noise_level: Int[Tensor, "n"],
    generator: torch.Generator | None = None,
) -> dict[str, Any]:
    """Return the upsampler's inputs: low_res with the noise of timestep `noise_level`, and that level."""
    noisy = diffusion.q_sample(low_res, noise_level, gaussian_noise(low_res, generator))
    return {"low_res": noisy, "noise_level": noise_level.to(low_res.device)}


def num_noise_levels(diffusion: GaussianDiffusion) -> int:
    """Return how many noise levels an upsampler is trained with: the first half of the timesteps."""
    return diffusion.num_timesteps // 2


def super_resolution_task(
    diffusion: GaussianDiffusion, network: Any, x_0: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    """The upsampler's task: draw x_0, given its low-resolution version with noise.

    Low noise levels are more frequent: at them the network has most to learn.
    """
    noise_level = (num_noise_levels(diffusion) * torch.rand(len(x_0)) ** 2).long()
    low_res = area_downsample(x_0, x_0.shape[-1] // FACTOR)
    return x_0, noise_augment(diffusion, low_res, noise_level)


def low_res_task(diffusion: GaussianDiffusion, network: Any, x_0: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The task of the first half of a cascade: draw x_0 at the network's own resolution."""
    return area_downsample(x_0, network.image_shape[-1]), {}


def preview_low_res(low_res: Tensor, noise_level: Tensor, size: int) -> Tensor:
    """Return what the upsampler sees, enlarged to the size of its samples, for previews."""
    return F.interpolate(low_res, (size, size))
