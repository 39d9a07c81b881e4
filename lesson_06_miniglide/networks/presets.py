"""The networks of lesson 6 and their training recipes.

    tiny             for two CPU cores: patches of 2x2 pixels, few but wide layers
    tiny_small       the same for 16x16 pixels, the first half of a cascade
    tiny_upsampler   16x16 to 64x64 pixels, the second half
    tiny_inpainting  fills masked regions; starts from tiny
    photos           tiny with five times the parameters, and attention at 16x16 as well: for photos
    report           the network that the report of miniGLIDE describes (it counts 1.5 million parameters)
    glide            the published GLIDE (Nichol et al. 2022)
    glide_upsampler  its upsampler, 64x64 to 256x256 pixels, which is also told a noise level here

`python -m lesson_06_miniglide.model` prints where their parameters are.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxtyping import Float
from torch import Tensor

from common.protocols import LossAtT
from lesson_01_ddpm.diffusion import betas_from_alpha_bar, linear_betas, loss_simple, uniform_timesteps
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.velocity import loss_hybrid_velocity, loss_simple_velocity
from lesson_05_cfg.guidance import Task, text_to_image_task
from lesson_05_cfg.timesteps import sample_noisy_timesteps
from lesson_06_miniglide.image_data.captioned_images import IMAGE_SIZE
from lesson_06_miniglide.image_data.tokenizers import GPT2_VOCABULARY
from lesson_06_miniglide.networks.inpainting import inpainting_task
from lesson_06_miniglide.networks.upsampler import LOW_RES, low_res_task, super_resolution_task

LESSON = "lesson_06_miniglide"
GLIDE = ADMConfig(
    image_size=IMAGE_SIZE,
    in_channels=3,
    out_channels=6,
    num_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    num_head_channels=64,
    num_groups=32,
)
GLIDE_UPSAMPLER = replace(GLIDE, image_size=256, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2)
GLIDE_TEXT = TextConfig(GPT2_VOCABULARY, context_length=128, width=512, layers=16, heads=8)
TINY = ADMConfig(
    image_size=IMAGE_SIZE,
    in_channels=3,
    out_channels=6,
    patch_size=2,
    num_channels=48,  # four times the 12 values of a patch, all of which have to pass through
    channel_mult=(1, 1, 4 / 3),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_head_channels=32,
    resblock_updown=False,
    num_groups=8,
)
PHOTOS = replace(TINY, num_channels=80, channel_mult=(1, 2, 2), attention_resolutions=(16, 8))
SMALL = replace(TINY, image_size=LOW_RES, patch_size=1, channel_mult=(1, 4 / 3), num_res_blocks=2)
TINY_TEXT = TextConfig(1000, context_length=24, width=64, layers=2, heads=4)


def shifted_cosine_betas(num_timesteps: int, divide_snr_by: float = 4.0) -> Float[Tensor, "{num_timesteps}"]:
    """Return the cosine schedule with every signal-to-noise ratio divided (Hoogeboom et al. 2023, section 3).

    The larger an image, the more neighbouring pixels repeat each other, and the more noise hides what is
    where. At twice the side, four times as much restores what the schedule was at 32x32.
    """
    alpha_bar = (1 - cosine_betas(num_timesteps)).cumprod(0)
    return betas_from_alpha_bar(alpha_bar / (alpha_bar + divide_snr_by * (1 - alpha_bar))).clamp(max=0.999)


@dataclass(frozen=True)
class Preset:
    """A network with its training recipe. The flags of train.py override network, batch and learning rate."""

    network: ADMConfig
    text: TextConfig
    velocity: bool = False  # predict velocity instead of noise
    inpaint: bool = False  # see the known pixels and their mask
    upsample: bool = False  # see a low-resolution image and its noise level
    task: Task = text_to_image_task
    betas: Callable[[int], Tensor] = cosine_betas
    sample_t: Callable[[int, int], Tensor] = uniform_timesteps
    learning_rate: float = 1e-4
    text_lr_scale: float = 1.0  # learning-rate multiplier of the text encoder
    batch_size: int = 32
    optimizer: Literal["adamw", "muon"] = "adamw"

    @property
    def losses(self) -> tuple[LossAtT, LossAtT]:
        """L_hybrid and L_simple at given timesteps."""
        return (loss_hybrid_velocity, loss_simple_velocity) if self.velocity else (loss_hybrid, loss_simple)

    @property
    def data_size(self) -> int:
        """Pixels of a side of the training images, of which `task` may use a smaller version."""
        return max(IMAGE_SIZE, self.network.image_size)

    @property
    def lr_scales(self) -> dict[str, float]:
        """Learning-rate multipliers by prefix of parameter names, as the trainer takes them."""
        prefix = "network." * (self.velocity + self.upsample)
        return {} if self.text_lr_scale == 1 else {f"{prefix}text_encoder.": self.text_lr_scale}


TINY_RECIPE: dict[str, Any] = {
    "text": TINY_TEXT,
    "velocity": True,
    "betas": shifted_cosine_betas,
    "sample_t": sample_noisy_timesteps,
    "text_lr_scale": 0.03,
    "batch_size": 128,
}
PRESETS = {
    "tiny": Preset(TINY, **TINY_RECIPE, learning_rate=6e-3, optimizer="muon"),
    "tiny_small": Preset(
        SMALL,
        **TINY_RECIPE | {"betas": cosine_betas},
        learning_rate=6e-3,
        optimizer="muon",
        task=low_res_task,
    ),
    "tiny_upsampler": Preset(
        TINY,
        **TINY_RECIPE | {"betas": linear_betas, "sample_t": uniform_timesteps},
        learning_rate=3e-3,
        optimizer="muon",
        task=super_resolution_task,
        upsample=True,
    ),
    "tiny_inpainting": Preset(
        TINY, **TINY_RECIPE, learning_rate=2e-3, optimizer="muon", task=inpainting_task, inpaint=True
    ),
    "photos": Preset(PHOTOS, **TINY_RECIPE | {"batch_size": 64}, learning_rate=4e-3, optimizer="muon"),
    "report": Preset(replace(GLIDE, num_channels=96, num_head_channels=32), GLIDE_TEXT),
    "glide": Preset(GLIDE, GLIDE_TEXT),
    "glide_upsampler": Preset(
        GLIDE_UPSAMPLER,
        GLIDE_TEXT,
        betas=linear_betas,
        task=super_resolution_task,
        upsample=True,
        batch_size=4,
    ),
}
OPENAI_PRESETS = ("glide", "glide_upsampler")  # whose networks OpenAI published, trained with T = 1000
