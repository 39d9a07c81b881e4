"""A network that looks at patches: on two cores, pixels at full resolution are what costs."""

from typing import ClassVar

import torch.nn.functional as F

from lesson_04_text_conditioning.text_unet import TextUNet, as_large_as
from lesson_04_text_conditioning.velocity import VelocityUNet

PATCH = 2  # pixels; a patch of 2x2 in 3 channels is one place in 12


def cut(images):
    """[N, C, H, W] -> [N, 4C, H / 2, W / 2]: the pixels of a patch become its channels."""
    return F.pixel_unshuffle(images, PATCH)


class PatchUNet(TextUNet):
    """A TextUNet on patches: from outside (x_t [N, 3, H, W], t, text) -> [N, 6, H, W], as ever.

    config: of the network inside, whose image_size is that of the patches. Nothing is lost by the
    rearrangement (a convolution of patches can do what one of pixels can), but every layer runs at a quarter
    of the places.
    """

    @property
    def image_shape(self):
        c, h, w = super().image_shape
        return (c // PATCH**2, h * PATCH, w * PATCH)

    def forward(self, x_t, t, text, image=None, mask=None, low_res=None):
        if image is not None:  # of a patch's mask it sees whether any pixel is known
            image, mask = cut(image * mask), F.max_pool2d(mask, PATCH)
        if low_res is not None:
            low_res = cut(as_large_as(x_t, low_res))
        return F.pixel_shuffle(super().forward(cut(x_t), t, text, image, mask, low_res), PATCH)


class PatchVelocityUNet(VelocityUNet, PatchUNet):
    """The same with lesson 4's reading of the output as a velocity, done on pixels, outside the patches."""

    # What a caption says of a photo is learned late, and its code has to wait for it.
    slow: ClassVar = {"text": 0.003}
