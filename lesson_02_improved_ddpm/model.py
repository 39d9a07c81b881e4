"""Lesson 2's model: lesson 1's UNet with a second output for the variance, and a choice of schedules."""

from collections.abc import Callable
from dataclasses import asdict, replace

from torch import Tensor

from common.protocols import Metadata, Model
from common.training.checkpoints import load_model
from common.training.config import config_from_dict
from lesson_01_ddpm import model as lesson_1
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_01_ddpm.model import NUM_TIMESTEPS
from lesson_01_ddpm.unet import UNet, UNetConfig
from lesson_02_improved_ddpm.schedules import cosine_betas

LESSON = "lesson_02_improved_ddpm"
IMAGE_SHAPE = lesson_1.IMAGE_SHAPE
UNET_CONFIG = replace(lesson_1.UNET_CONFIG, out_channels=2)  # NEW: eps_hat and v
SCHEDULES: dict[str, Callable[[int], Tensor]] = {"linear": linear_betas, "cosine": cosine_betas}


def make_diffusion(schedule: str = "cosine") -> GaussianDiffusion:
    """Return a process of 1000 timesteps with the schedule of that name."""
    return GaussianDiffusion(SCHEDULES[schedule](NUM_TIMESTEPS))  # NEW: cosine


def build_model(config: UNetConfig = UNET_CONFIG, schedule: str = "cosine") -> Model:
    """Return an untrained network, its process, and the metadata to build them again."""
    return Model(UNet(config), make_diffusion(schedule), {"network": asdict(config)})


def build_from_metadata(metadata: Metadata) -> Model:
    """Return the model that a checkpoint's metadata describes, untrained."""
    return build_model(config_from_dict(UNetConfig, metadata["network"]), metadata["config"]["schedule"])


def load(checkpoint: str | None = None, device: str = "cpu") -> Model:
    """Return lesson 2's model from a checkpoint, by default pretrained. Raises UserError."""
    return load_model(checkpoint, LESSON, build_from_metadata, device)
