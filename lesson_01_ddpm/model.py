"""Lesson 1's model: network settings, noise schedule, and how to build both again from a checkpoint."""

from dataclasses import asdict
from typing import Annotated

from common.cli import Bounds
from common.protocols import Metadata, Model
from common.training.checkpoints import load_model
from common.training.config import config_from_dict
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_01_ddpm.unet import UNet, UNetConfig

LESSON = "lesson_01_ddpm"
NUM_TIMESTEPS = 1000
IMAGE_SHAPE = (1, 32, 32)
# Half the channels at 32x32, where most of the time is spent and digits need little.
UNET_CONFIG = UNetConfig(channel_mult=(0.5, 1, 2, 2))
# A number of sampling steps, as the type of a flag.
SamplingSteps = Annotated[
    int, Bounds(1, NUM_TIMESTEPS, f"lie between 1 and {NUM_TIMESTEPS}, the number of timesteps")
]


def make_diffusion() -> GaussianDiffusion:
    """Return DDPM's process: a linear schedule of 1000 timesteps."""
    return GaussianDiffusion(linear_betas(NUM_TIMESTEPS))


def build_model(config: UNetConfig = UNET_CONFIG) -> Model:
    """Return an untrained network, its process, and the metadata to build them again."""
    return Model(UNet(config), make_diffusion(), {"network": asdict(config)})


def build_from_metadata(metadata: Metadata) -> Model:
    """Return the model that a checkpoint's metadata describes, untrained."""
    return build_model(config_from_dict(UNetConfig, metadata["network"]))


def load(checkpoint: str | None = None, device: str = "cpu") -> Model:
    """Return lesson 1's model from a checkpoint, by default pretrained. Raises UserError."""
    return load_model(checkpoint, LESSON, build_from_metadata, device)
