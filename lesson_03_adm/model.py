"""Lesson 3's model: the ADM UNet, conditioned on the digit."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn

from common.conditioning import select
from common.protocols import Metadata, Model
from common.sampling import MakeDenoiser
from common.training.checkpoints import load_model
from common.training.config import config_from_dict
from lesson_02_improved_ddpm.model import IMAGE_SHAPE, make_diffusion
from lesson_03_adm.adm_unet import (
    ADMConfig,
    ClassConditionalUNet,
    MultiHeadAttention,
    ResBlock,
    pointwise_linear,
)

__all__ = [
    "IMAGE_SHAPE",
    "LESSON",
    "UNET_CONFIG",
    "build_model",
    "class_denoiser",
    "load",
    "make_diffusion",
    "use_parts",
    "variants",
]

LESSON = "lesson_03_adm"
# NEW: AdaGN, residual blocks that resample, attention at two resolutions in heads of 32 channels
UNET_CONFIG = ADMConfig(
    out_channels=2, channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4), num_head_channels=32
)
# Lesson 2's UNet with classes, and what ADM changed; lesson 3 leaves out the attention at 16x16.
PLAIN = replace(
    UNET_CONFIG,
    attention_resolutions=(8,),
    num_head_channels=None,
    scale_shift_norm=False,
    resblock_updown=False,
)
CHANGES: dict[str, dict[str, Any]] = {
    "AdaGN": {"scale_shift_norm": True},
    "attention at 16, 8, 4": {"attention_resolutions": (16, 8, 4)},
    "heads of 32": {"num_head_channels": 32},
    "BigGAN up and down": {"resblock_updown": True},
}


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


def variants() -> dict[str, ADMConfig]:
    """Return the settings of the ablation's networks by name: plain, with each change alone, with all."""
    alone = {f"+ {name}": replace(PLAIN, **change) for name, change in CHANGES.items()}
    together = {key: value for change in CHANGES.values() for key, value in change.items()}
    return {"DDPM UNet": PLAIN} | alone | {"all": replace(PLAIN, **together)}


def use_parts(adm_block: Callable, split_heads: Callable) -> None:
    """Let all UNets of this process compute with the functions of exercises 3.3 and 3.2."""

    def project_qkv(layer: MultiHeadAttention, x: Tensor) -> tuple[Tensor, ...]:
        positions = layer.norm(x).flatten(2).transpose(1, 2)
        # the linear map returns q, k and v of head 1, then q, k and v of head 2, ...
        heads = split_heads(pointwise_linear(layer.qkv, positions), layer.num_heads)
        return heads.chunk(3, -1)

    ResBlock.forward = lambda block, x, emb, context: adm_block(block, x, emb)  # type: ignore[assignment]
    MultiHeadAttention.project_qkv = project_qkv  # type: ignore[assignment]
