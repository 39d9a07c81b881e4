"""Loading the weights of the published GLIDE networks: base, upsampler, inpainting."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from lesson_03_adm.openai_checkpoints import RENAMES, Renames, config_from_openai, rename
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet

TEXT_RENAMES: Renames = [
    (r"^transformer\.resblocks\.", "blocks."),
    (r"\.attn\.c_qkv\.", ".qkv."),
    (r"\.attn\.c_proj\.", ".proj."),
    (r"\.mlp\.c_fc\.", ".fc_1."),
    (r"\.mlp\.c_proj\.", ".fc_2."),
    (r"^transformer_proj\.", "proj."),
]
UNET_RENAMES: Renames = [*RENAMES, (r"\.encoder_kv\.", ".text_kv.")]
TEXT_PARTS = ("transformer", "token_embedding", "positional_embedding", "padding_embedding", "final_ln")


def glide_from_openai(settings: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> TextUNet:
    """Return the GLIDE network with these settings and weights. Raises RuntimeError if they do not fit."""
    config = replace(config_from_openai(settings), out_channels=6)  # GLIDE always learns the variance
    text_config = TextConfig(
        vocab_size=settings["n_vocab"],
        context_length=settings["text_ctx"],
        width=settings["xf_width"],
        layers=settings["xf_layers"],
        heads=settings["xf_heads"],
    )
    network = TextUNet(config, text_config, settings.get("inpaint", False), settings.get("super_res", False))
    weights = {}
    for name, weight in state_dict.items():
        if name.startswith(TEXT_PARTS):
            weights["text_encoder." + rename(name, TEXT_RENAMES)] = weight
        else:
            weights["unet." + rename(name, UNET_RENAMES)] = weight
    network.load_state_dict(weights)
    return network.eval()
