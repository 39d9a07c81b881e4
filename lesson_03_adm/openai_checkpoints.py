"""Loading the ADM weights that OpenAI published: the same networks with other parameter names."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from lesson_03_adm.adm_unet import ADMConfig, ClassConditionalUNet, build_adm_unet

Renames = Sequence[tuple[str, str | Callable[[re.Match], str]]]  # pattern -> what takes its place

# published pattern -> our name, applied in this order
RENAMES: Renames = [
    (r"^time_embed\.", "time_mlp."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^input_blocks\.(\d+)\.", lambda found: f"down.{int(found[1]) - 1}."),
    (r"^middle_block\.", "middle."),
    (r"^output_blocks\.", "up."),
    (r"^out\.", "conv_out."),
    (r"in_layers\.0\.", "norm_1."),
    (r"in_layers\.2\.", "conv_1."),
    (r"emb_layers\.1\.", "emb."),
    (r"out_layers\.0\.", "norm_2."),
    (r"out_layers\.3\.", "conv_2."),
    (r"skip_connection\.", "skip."),
    (r"\.op\.", ".conv."),
    (r"\.proj_out\.", ".proj."),
]
DEFAULT_CHANNEL_MULT = {64: "1,2,3,4", 128: "1,1,2,3,4", 256: "1,1,2,2,4,4", 512: "0.5,1,1,2,2,4,4"}


def rename(name: str, renames: Renames) -> str:
    """Return a parameter's name in another layout: all patterns are replaced, one after the other."""
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


def parse_numbers(text: str) -> tuple[Any, ...]:
    """Parse "0.5,1,2" to (0.5, 1, 2)."""
    return tuple(float(n) if "." in n else int(n) for n in text.split(","))


def config_from_openai(settings: Mapping[str, Any]) -> ADMConfig:
    """Return the ADMConfig of a published network's settings; absent settings have the published defaults."""
    head_channels = settings.get("num_head_channels", -1)
    return ADMConfig(
        image_size=settings["image_size"],
        in_channels=3,
        out_channels=6 if settings.get("learn_sigma", False) else 3,
        num_channels=settings["num_channels"],
        channel_mult=parse_numbers(
            settings.get("channel_mult") or DEFAULT_CHANNEL_MULT[settings["image_size"]]
        ),
        num_res_blocks=settings["num_res_blocks"],
        attention_resolutions=parse_numbers(settings["attention_resolutions"]),
        num_groups=32,
        num_heads=settings.get("num_heads", 1),
        num_head_channels=head_channels if head_channels > 0 else None,
        scale_shift_norm=settings.get("use_scale_shift_norm", False),
        resblock_updown=settings.get("resblock_updown", False),
        dropout=settings.get("dropout", 0.0),
    )


def to_legacy_qkv_order(weight: Tensor, config: ADMConfig) -> Tensor:
    """Reorder the rows of a qkv layer from "queries, keys, values of all heads" to "head by head".

    The first is the published code's `use_new_attention_order`, which its 64x64 network has; the second, its
    legacy order, is ours.
    """
    width = config.num_head_channels or len(weight) // 3 // config.num_heads
    return rearrange(weight, "(part head width) ... -> (head part width) ...", part=3, width=width)


def adm_from_openai(settings: Mapping[str, Any], state_dict: Mapping[str, Tensor]) -> nn.Module:
    """Return the ADM network with these weights: a ClassConditionalUNet, or a UNet without classes.

    Raises RuntimeError if the weights do not fit the settings.
    """
    config = config_from_openai(settings)
    weights = {rename(name, RENAMES): weight for name, weight in state_dict.items()}
    if settings.get("use_new_attention_order", False):
        for name in [name for name in weights if ".qkv." in name]:
            weights[name] = to_legacy_qkv_order(weights[name], config)
    network: nn.Module
    if settings.get("class_cond", False):
        network = ClassConditionalUNet(config, settings["num_classes"])
        label = weights.pop("label_emb.weight")
        weights = {f"unet.{name}": weight for name, weight in weights.items()}
        weights["class_embedding.weight"] = label
    else:
        network = build_adm_unet(config)
    network.load_state_dict(weights)
    return network.eval()
