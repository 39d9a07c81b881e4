"""Lesson 6's models: from a preset, from flags, or from a checkpoint's metadata.

`python -m lesson_06_miniglide.model` prints where the parameters of the presets are.
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
import tyro
from jaxtyping import Float
from torch import Tensor, nn

from common.cli import check_choice, run_command
from common.errors import UserError
from common.protocols import Metadata, Model
from common.training.config import config_from_dict
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextAttention, TextUNet
from lesson_04_text_conditioning.velocity import VelocityPrediction
from lesson_06_miniglide.networks.frozen_t5 import T5Config, uses_t5
from lesson_06_miniglide.networks.presets import PRESETS, Preset
from lesson_06_miniglide.networks.upsampler import NoiseLevelConditioning

TRAINABLE = ("all", "unet", "text")  # parts of a network; see `set_trainable`


def build_network(
    preset: Preset, config: ADMConfig, text_config: Any, alpha_bar: Float[Tensor, "T"]
) -> nn.Module:
    """Return an untrained network of a preset's kind with these settings.

    text_config: TextConfig or T5Config. alpha_bar: of the process, for networks that predict velocity. Raises
    ValueError if channels and heads, or channels and groups, do not fit together.
    """
    network: nn.Module = TextUNet(config, text_config, preset.inpaint, preset.upsample)
    if preset.upsample:
        network = NoiseLevelConditioning(network)
    return VelocityPrediction(network, alpha_bar) if preset.velocity else network


def make_diffusion(preset: Preset, timesteps: int = 1000) -> GaussianDiffusion:
    """Return the process of a preset. Raises UserError if its schedule does not allow so few timesteps."""
    try:
        return GaussianDiffusion(preset.betas(timesteps))
    except ValueError as error:
        raise UserError(f"--timesteps {timesteps}: {error}") from None


def build_model(
    preset: str | Preset, config: ADMConfig | None = None, text_config: Any = None, timesteps: int = 1000
) -> Model:
    """Return an untrained model of a preset or of its name, by default with its own settings, with metadata.

    Raises UserError.
    """
    preset = PRESETS[preset] if isinstance(preset, str) else preset
    config, text_config = config or preset.network, text_config or preset.text
    diffusion = make_diffusion(preset, timesteps)
    network = build_network(preset, config, text_config, diffusion.alpha_bar)
    return Model(network, diffusion, {"network": asdict(config), "text": asdict(text_config)})


def build_from_metadata(metadata: Metadata) -> Model:
    """Return the model that a checkpoint's metadata describes, untrained. Raises UserError."""
    if "network" not in metadata:
        raise UserError("--checkpoint is not a text-to-image network")
    text_class = T5Config if uses_t5(metadata) else TextConfig
    return build_model(
        metadata["config"]["preset"],
        config_from_dict(ADMConfig, metadata["network"]),
        config_from_dict(text_class, metadata["text"]),
        metadata["config"]["timesteps"],
    )


def resolve_configs(config: Any) -> tuple[ADMConfig, TextConfig]:
    """Return network and text settings of train.py's flags. Raises UserError if they do not fit together."""
    preset = PRESETS[config.preset]
    network = with_overrides(
        preset.network,
        num_channels=config.num_channels,
        num_head_channels=config.num_head_channels,
        num_res_blocks=config.num_res_block,
    )
    text = with_overrides(preset.text, width=config.xf_width, layers=config.xf_layers, heads=config.xf_heads)
    if config.no_vlb:
        network = without_variance(network)
    try:
        with torch.device("meta"):
            build_network(preset, network, text, torch.ones(1))
    except ValueError as error:
        raise UserError(
            f"{error}; change --num-channels, --num-head-channels, --xf-width or --xf-heads"
        ) from None
    return network, text


def without_variance(config: ADMConfig) -> ADMConfig:
    """Return the settings of a network that does not learn its variance."""
    return replace(config, out_channels=config.in_channels)


def with_overrides(config: Any, **overrides: Any) -> Any:
    """Return settings with those overrides that are not None."""
    return replace(config, **{name: value for name, value in overrides.items() if value is not None})


def unwrap(network: nn.Module) -> TextUNet:
    """Return the TextUNet inside its wrappers."""
    while not isinstance(network, TextUNet):
        network = network.network  # type: ignore[assignment]
    return network


def set_trainable(network: nn.Module, part: str) -> None:
    """Choose which parameters are trained; all others are frozen, with requires_grad False.

    part: one of TRAINABLE. "unet" is all but the text encoder. "text" is the text encoder together with the
    layers that turn its token states into keys and values of the UNet's attention.
    """
    unet = unwrap(network)
    network.requires_grad_(part != "text")
    unet.text_encoder.requires_grad_(part != "unet")
    for layer in unet.modules():
        if isinstance(layer, TextAttention):
            layer.text_kv.requires_grad_(True)


def parameter_counts(network: nn.Module) -> dict[str, int]:
    """Return the parameters of each component, and of the whole network."""
    unet = unwrap(network)
    text = unet.text_encoder
    attention = [m for m in unet.modules() if isinstance(m, TextAttention)]
    parts = {
        "token embeddings": text.token_embedding,
        "text transformer": text,
        "text keys and values": nn.ModuleList(m.text_kv for m in attention),
        "image attention": nn.ModuleList(attention),
        "rest of the UNet": network,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["total"] = counts["rest of the UNet"]
    counts["rest of the UNet"] -= counts["text transformer"] + counts["image attention"]
    counts["text transformer"] -= counts["token embeddings"]
    counts["image attention"] -= counts["text keys and values"]
    return counts


@dataclass(frozen=True)
class Config:
    """Print where the parameters of the presets are."""

    preset: tyro.conf.Positional[str | None] = None  # one of the above; default all


def main(config: Config) -> None:
    check_choice("preset", config.preset or "tiny", PRESETS)
    names = [config.preset] if config.preset else list(PRESETS)
    with torch.device("meta"):  # shapes without memory
        presets = [PRESETS[name] for name in names]
        counts = [parameter_counts(build_network(p, p.network, p.text, torch.ones(1000))) for p in presets]
    print(f"{'':24}" + "".join(f"{name:>16}" for name in names))
    for part in counts[0]:
        print(f"{part:24}" + "".join(f"{count[part]:16,}" for count in counts))


if __name__ == "__main__":
    run_command(main, Config)
