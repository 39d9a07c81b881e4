"""Lesson 3's model: the ADM UNet, conditioned on the digit."""

from dataclasses import asdict
from functools import partial

from jaxtyping import Int
from torch import Tensor, nn

from common.conditioning import select
from common.protocols import Metadata, Model
from common.sampling import MakeDenoiser
from common.training.checkpoints import load_model
from common.training.config import config_from_dict
from lesson_02_improved_ddpm.model import IMAGE_SHAPE, make_diffusion
from lesson_03_adm.adm_unet import ADMConfig, ClassConditionalUNet

__all__ = ["IMAGE_SHAPE", "LESSON", "UNET_CONFIG", "build_model", "class_denoiser", "load", "make_diffusion"]

LESSON = "lesson_03_adm"
# NEW: AdaGN, residual blocks that resample, attention at two resolutions in heads of 32 channels
UNET_CONFIG = ADMConfig(
    out_channels=2, channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4), num_head_channels=32
)


def build_model(config: ADMConfig = UNET_CONFIG) -> Model:
    """Return an untrained network, its process, and the metadata to build them again."""
    return Model(ClassConditionalUNet(config), make_diffusion(), {"network": asdict(config)})


def build_from_metadata(metadata: Metadata) -> Model:
    """Return the model that a checkpoint's metadata describes, untrained."""
    return build_model(config_from_dict(ADMConfig, metadata["network"]))


def load(checkpoint: str | None = None, device: str = "cpu") -> Model:
    """Return lesson 3's model from a checkpoint, by default pretrained. Raises UserError."""
    return load_model(checkpoint, LESSON, build_from_metadata, device)


def class_denoiser(network: nn.Module, classes: Int[Tensor, "n"]) -> MakeDenoiser:
    """Return indices -> denoiser for samples of classes[indices], as `common.sampling` takes it."""
    classes = classes.to(next(network.parameters()).device)
    return lambda indices: partial(network, y=select(classes, indices))
