"""The model of lessons 4 and 5: GLIDE's UNet on captioned digits, predicting velocity."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from common.conditioning import select
from common.layers import autocast_off
from common.protocols import Conditioning, Metadata, Model, TextToImageNetwork, Tokenizer
from common.training.checkpoints import load_model
from common.training.config import config_from_dict
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_04_text_conditioning.velocity import VelocityPrediction

LESSON = "lesson_04_text_conditioning"
IMAGE_SHAPE = (3, 32, 32)
UNET_CONFIG = ADMConfig(
    in_channels=3,
    out_channels=6,
    channel_mult=(1, 1, 2, 2),
    attention_resolutions=(8, 4),
    num_head_channels=32,
)
# Learning-rate multipliers: while the encoding of a caption keeps changing, the UNet cannot learn to use it.
LR_SCALES = {"network.text_encoder.": 0.03}


def build_model(
    tokenizer: CaptionTokenizer, config: ADMConfig = UNET_CONFIG, text_config: TextConfig | None = None
) -> Model:
    """Return an untrained network for this tokenizer, its process, and metadata to build them again."""
    text_config = text_config or TextConfig(tokenizer.vocab_size, tokenizer.context_length)
    diffusion = make_diffusion()
    network = VelocityPrediction(TextUNet(config, text_config), diffusion.alpha_bar)
    metadata = {"network": asdict(config), "text": asdict(text_config), "tokenizer": tokenizer.to_json()}
    return Model(network, diffusion, metadata)


def build_from_metadata(metadata: Metadata) -> Model:
    """Return the model that a checkpoint's metadata describes, untrained."""
    config = config_from_dict(ADMConfig, metadata["network"])
    return build_model(
        tokenizer_from_metadata(metadata), config, config_from_dict(TextConfig, metadata["text"])
    )


def tokenizer_from_metadata(metadata: Mapping[str, Any]) -> CaptionTokenizer:
    """Return the tokenizer that a checkpoint was trained with."""
    return CaptionTokenizer.from_json(metadata["tokenizer"], metadata["text"]["context_length"])


def load(checkpoint: str | None = None, device: str = "cpu") -> Model:
    """Return lesson 4's model from a checkpoint, by default pretrained. Raises UserError."""
    return load_model(checkpoint, LESSON, build_from_metadata, device)


@torch.no_grad()
def encode_prompts(network: TextToImageNetwork, tokenizer: Tokenizer, prompts: Sequence[str]) -> Conditioning:
    """Encode prompts in fp32 on the network's device; each distinct prompt is encoded once."""
    device = next(network.parameters()).device
    distinct = list(dict.fromkeys(prompts))
    with autocast_off(device.type):
        tokens, mask = tokenizer.encode(distinct)  # a frozen T5 computes hidden states here
        text = network.encode_text(tokens.to(device), mask.to(device))
    return select(text, torch.tensor([distinct.index(prompt) for prompt in prompts]))
