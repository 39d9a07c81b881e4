"""Reading and writing the layout of the published GLIDE networks: base, upsampler, inpainting."""

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
# The other direction: our name -> the published one, also applied in this order
TEXT_TO_OPENAI: Renames = [
    (r"^proj\.", "transformer_proj."),
    (r"^blocks\.", "transformer.resblocks."),
    (r"\.qkv\.", ".attn.c_qkv."),
    (r"\.proj\.", ".attn.c_proj."),
    (r"\.fc_1\.", ".mlp.c_fc."),
    (r"\.fc_2\.", ".mlp.c_proj."),
]
UNET_TO_OPENAI: Renames = [
    (r"^(down\.\d+\.\d+)\.conv\.", r"\1.op."),
    (r"^time_mlp\.", "time_embed."),
    (r"^conv_in\.", "input_blocks.0.0."),
    (r"^down\.(\d+)\.", lambda found: f"input_blocks.{int(found[1]) + 1}."),
    (r"^middle\.", "middle_block."),
    (r"^up\.", "output_blocks."),
    (r"^conv_out\.", "out."),
    (r"\.norm_1\.", ".in_layers.0."),
    (r"\.conv_1\.", ".in_layers.2."),
    (r"\.emb\.", ".emb_layers.1."),
    (r"\.norm_2\.", ".out_layers.0."),
    (r"\.conv_2\.", ".out_layers.3."),
    (r"\.skip\.", ".skip_connection."),
    (r"\.proj\.", ".proj_out."),
    (r"\.text_kv\.", ".encoder_kv."),
]
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
    network.load_state_dict(weights_from_openai(state_dict))
    return network.eval()


def weights_from_openai(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a published state dict under the names of a TextUNet's parameters."""
    weights = {}
    for name, weight in state_dict.items():
        if name.startswith(TEXT_PARTS):
            weights["text_encoder." + rename(name, TEXT_RENAMES)] = weight
        else:
            weights["unet." + rename(name, UNET_RENAMES)] = weight
    return weights


def weights_to_openai(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a TextUNet's state dict under the published names: the inverse of `weights_from_openai`."""
    weights = {}
    for name, weight in state_dict.items():
        part, _, rest = name.partition(".")
        weights[rename(rest, TEXT_TO_OPENAI if part == "text_encoder" else UNET_TO_OPENAI)] = weight
    return weights
