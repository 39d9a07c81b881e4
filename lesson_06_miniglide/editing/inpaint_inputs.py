"""An image and a mask to inpaint with: read from files, passed to networks and samplers."""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn

from common.errors import UserError
from common.images import to_tensor
from common.protocols import DenoisedFn, SamplerStep
from lesson_01_ddpm.diffusion import clamp_x_0
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_06_miniglide.editing.samplers import repaint_sample
from lesson_06_miniglide.image_data.decoding import to_rgb

# Masks have at most this many pixels per side. An upsampler then fills exactly what the base model filled.
MASK_SIZE = 64
# (process, denoiser, x_T, generator) -> steps, with `denoised_fn` as a keyword argument
InpaintSampler = Callable[..., Iterator[SamplerStep]]


@dataclass(frozen=True)
class InpaintInputs:
    """An image and a mask that selects the part to replace."""

    image: Float[Tensor, "#n c h w"]  # in [-1, 1]
    keep_mask: Float[Tensor, "#n 1 h w"]  # 1 where the image is kept

    @classmethod
    def load(cls, image: str | Path, mask: str | Path, size: int) -> "InpaintInputs":
        """Read two files and resize them to `size`; the mask is white in the region to replace.

        Raises UserError, naming --image or --mask, if a file cannot be read or nothing is white.
        """
        white = np.array(mask_to_gray(read_image(mask, "--mask"))) >= 128
        replaced = downsample_mask(white, min(size, MASK_SIZE))
        if not replaced.any():
            raise UserError(f"--mask {mask} is black; paint the region to replace white")
        keep_mask = F.interpolate(torch.from_numpy(~replaced).float()[None, None], (size, size))
        return cls(resize_square(read_image(image, "--image"), size), keep_mask)

    def unet_kwargs(self, n: int) -> dict[str, Tensor]:
        """Return what a network that was trained to inpaint sees besides x_t, for n samples."""
        inputs = {"inpaint_image": self.image, "inpaint_mask": self.keep_mask}
        return {name: x.expand(n, -1, -1, -1) for name, x in inputs.items()}

    def denoised_fn(
        self, x_0: Float[Tensor, "n c h w"], clip_fn: DenoisedFn = clamp_x_0
    ) -> Float[Tensor, "n c h w"]:
        """Clip the predicted x_0 and overwrite its known pixels; for any sampler with a `denoised_fn`."""
        keep_mask = self.keep_mask.to(x_0.device)
        return clip_fn(x_0) * (1 - keep_mask) + self.image.to(x_0.device) * keep_mask

    def make_sampler(
        self,
        network: nn.Module,
        sampler: InpaintSampler,
        n: int,
        num_resamples: int,
        denoised_fn: DenoisedFn = clamp_x_0,
    ) -> tuple[InpaintSampler, dict[str, Tensor]]:
        """Return a sampler that keeps the known pixels, and further inputs of the network, for n samples.

        A network that was trained to inpaint uses `sampler`, one with a `denoised_fn` argument. Any other
        network uses `repaint_sample` with `num_resamples`.
        """
        if is_trained_to_inpaint(network):
            overwrite = partial(self.denoised_fn, clip_fn=denoised_fn)
            return partial(sampler, denoised_fn=overwrite), self.unet_kwargs(n)
        repaint = partial(repaint_sample, image=self.image, keep_mask=self.keep_mask)
        return partial(repaint, num_resamples=num_resamples, denoised_fn=denoised_fn), {}


def is_trained_to_inpaint(network: nn.Module) -> bool:
    """Return whether a network of any lesson sees the known pixels and their mask."""
    return any(isinstance(module, TextUNet) and module.inpaint for module in network.modules())


def downsample_mask(mask: Bool[np.ndarray, "h w"], size: int) -> Bool[np.ndarray, "{size} {size}"]:
    """Return a smaller mask, True where any of the pixels is True, so that no brush stroke is too thin."""
    return np.array(Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.BOX)) > 0


def mask_to_gray(mask: Image.Image) -> Image.Image:
    """Return a mask in gray. Transparent pixels become black, so that only painted pixels are white."""
    if mask.has_transparency_data:
        mask = mask.convert("RGBA")
        mask = Image.alpha_composite(Image.new("RGBA", mask.size, "black"), mask)
    return to_rgb(mask).convert("L")


def resize_square(
    image: Image.Image, size: int, channels: int = 3
) -> Float[Tensor, "1 {channels} {size} {size}"]:
    """Return an image of 1 or 3 channels in [-1, 1], squeezed to a square as in training."""
    image = (
        to_rgb(image).convert("RGB" if channels == 3 else "L").resize((size, size), Image.Resampling.BICUBIC)
    )
    return to_tensor(np.array(image).reshape(1, size, size, channels))


def read_image(path: str | Path, flag: str) -> Image.Image:
    """Return a PIL image. Raises UserError, naming the flag, if the file is not an image or far too large."""
    too_large = (Image.DecompressionBombWarning, Image.DecompressionBombError)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
        return image
    except (OSError, SyntaxError, *too_large) as error:
        raise UserError(f"{flag} {path} cannot be read as an image ({error})") from None
