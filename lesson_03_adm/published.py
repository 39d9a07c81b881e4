"""Reading the weights that OpenAI published: the same networks under other names."""

import re

from einops import rearrange

from lesson_03_adm.adm_unet import ADMConfig, ClassUNet, adm_unet

# published name -> ours, applied in this order
RENAMES = [
    (r"^time_embed\.", "time_mlp."),
    (r"^input_blocks\.0\.0\.", "first."),
    (r"^input_blocks\.(\d+)\.", lambda found: f"down.{int(found[1]) - 1}."),
    (r"^middle_block\.", "middle."),
    (r"^output_blocks\.", "up."),
    (r"^out\.", "last."),
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


def rename(name, renames):
    for pattern, ours in renames:
        name = re.sub(pattern, ours, name)
    return name


def numbers(text):
    return tuple(float(n) if "." in n else int(n) for n in text.split(","))


def config_from_published(settings):
    """ADMConfig of a published network's settings (a dict; what is absent has the published default)."""
    head_channels = settings.get("num_head_channels", -1)
    return ADMConfig(
        image_size=settings["image_size"],
        in_channels=3,
        out_channels=6 if settings.get("learn_sigma", False) else 3,
        num_channels=settings["num_channels"],
        channel_mult=numbers(settings.get("channel_mult") or DEFAULT_CHANNEL_MULT[settings["image_size"]]),
        num_res_blocks=settings["num_res_blocks"],
        attention_resolutions=numbers(settings["attention_resolutions"]),
        groups=32,
        num_heads=settings.get("num_heads", 1),
        num_head_channels=head_channels if head_channels > 0 else None,
        scale_shift_norm=settings.get("use_scale_shift_norm", False),
        resblock_updown=settings.get("resblock_updown", False),
        dropout=settings.get("dropout", 0.0),
    )


def by_heads(weight, config):
    """Rows of a qkv layer that are queries, keys and values of all heads -> those of one head after another.

    The first is the published code's "new attention order", which its 64x64 network has; the second ours.
    """
    width = config.num_head_channels or len(weight) // 3 // config.num_heads
    return rearrange(weight, "(part head width) ... -> (head part width) ...", part=3, width=width)


def adm_from_published(settings, state_dict):
    """The ADM network with these weights: a ClassUNet if class-conditional, else a UNet."""
    config = config_from_published(settings)
    weights = {rename(name, RENAMES): weight for name, weight in state_dict.items()}
    if settings.get("use_new_attention_order", False):
        for name in [name for name in weights if ".qkv." in name]:
            weights[name] = by_heads(weights[name], config)
    if settings.get("class_cond", False):
        network = ClassUNet(config, settings["num_classes"])
        label = weights.pop("label_emb.weight")
        weights = {f"unet.{name}": weight for name, weight in weights.items()}
        weights["class_embedding.weight"] = label
    else:
        network = adm_unet(config)
    network.load_state_dict(weights)
    return network.eval()
