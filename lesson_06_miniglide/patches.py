"""A network that looks at patches: on two cores, pixels at full resolution are what costs."""

import torch.nn.functional as F

from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.velocity import VelocityUNet

PATCH = 2  # pixels; a patch of 2x2 in 3 channels is one place in 12


class PatchUNet(TextUNet):
    """A TextUNet on patches: from outside (x_t [N, 3, H, W], t, text) -> [N, 6, H, W], as ever.

    config: of the network inside, whose image_size is that of the patches. Nothing is lost by the
    rearrangement (a convolution of patches can do what one of pixels can), but every layer runs at a quarter
    of the places.
    """

    def forward(self, x_t, t, text):
        output = super().forward(F.pixel_unshuffle(x_t, PATCH), t, text)
        return F.pixel_shuffle(output, PATCH)


class PatchVelocityUNet(VelocityUNet, PatchUNet):
    """The same with lesson 4's reading of the output as a velocity, done on pixels, outside the patches."""
