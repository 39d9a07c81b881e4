"""The second half of a cascade: a network that draws a large picture of a small one (Ho et al. 2022).

What it is given at the end is no photo made small but another network's sample, with faults that no photo
has. So in training its small pictures get noise, as much as it is told, and learn not to be trusted too far:
noise conditioning augmentation.
"""

import torch
import torch.nn.functional as F

from lesson_01_ddpm.unet import time_mlp, timestep_embedding, zero
from lesson_04_text_conditioning.text_unet import as_large_as
from lesson_06_miniglide.patches import PatchVelocityUNet

LOW_RES = 16  # pixels


class UpsamplingUNet(PatchVelocityUNet):
    """(x_t, t, text, low_res [N, 3, h, w], level [N]) -> [N, 6, H, W].

    level: the timestep whose noise was added to low_res, told to the network as t is. What the small picture
    shows need not be drawn again: it is taken out of x_t, and what is left is a noisy x_0 - low_res, with the
    same noise (Li et al. 2022, SRDiff).
    """

    def __init__(self, config, text_config, alpha_bar):
        super().__init__(config, text_config, alpha_bar, upsample=True)
        self.level_mlp = time_mlp(config.num_channels)
        zero(self.level_mlp[-1])

    def forward(self, x_t, t, text, low_res, level):
        emb = self.level_mlp(timestep_embedding(level, self.config.num_channels))
        alpha_bar_t, alpha_bar_level = (self.alpha_bar[i].view(-1, 1, 1, 1) for i in (t, level))
        shown = as_large_as(x_t, low_res)
        rest = x_t - (alpha_bar_t * alpha_bar_level).sqrt() * shown
        return super().forward(rest, t, text._replace(embedding=text.embedding + emb), low_res=shown)

    def picture_of(self, low_res, level):
        """What the network sees, as large as what it draws."""
        return F.interpolate(low_res, self.image_shape[1:])


def shrink(images, size):
    """[N, C, H, W] -> [N, C, size, size], each pixel the mean of those it stands for."""
    return F.interpolate(images, (size, size), mode="area")


def noised(diffusion, low_res, level):
    """What the network sees of low_res. level: int64 [N]; at 0 the noise is that of a gray level."""
    noisy = diffusion.q_sample(low_res, level, torch.randn_like(low_res))
    return {"low_res": noisy, "level": level.to(low_res.device)}


def enlarge(diffusion, network, x_0):
    """The task: draw x_0, seeing it small and with noise of the first half of the timesteps, mostly little:
    there is most to be seen, and to be learned."""
    level = (num_levels(diffusion) * torch.rand(len(x_0)) ** 2).long()
    return x_0, noised(diffusion, shrink(x_0, LOW_RES), level)


def num_levels(diffusion):
    return diffusion.num_timesteps // 2


def draw_small(diffusion, network, x_0):
    """The task of the first half: draw x_0, made as small as the network's pictures are."""
    return shrink(x_0, network.image_shape[-1]), {}
