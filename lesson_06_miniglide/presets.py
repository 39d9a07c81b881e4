"""The networks of lesson 6, and where their parameters are.

    tiny             for two CPU cores: patches of 2x2 pixels, and few but wide layers
    tiny_small       the same for 16x16 pixels, to be enlarged
    tiny_upsampler   16x16 to 64x64 pixels
    tiny_inpainting  fills holes; begins as tiny
    report           what the report of miniGLIDE describes; it calls this 1.5 million parameters
    glide            the published GLIDE (Nichol et al. 2022)

`python lesson_06_miniglide/presets.py` prints the table.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import tyro

from common.command import UserError, check_choice, run_command
from common.runs import as_config
from lesson_01_ddpm.diffusion import GaussianDiffusion, betas_of, linear_betas, loss_simple
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.velocity import VelocityUNet, loss_velocity, loss_velocity_simple
from lesson_05_cfg.guidance import draw
from lesson_06_miniglide.inpainting import InpaintingUNet, inpaint
from lesson_06_miniglide.outside_text import OutsideConfig, is_outside
from lesson_06_miniglide.patches import PATCH
from lesson_06_miniglide.sketch import PatchSketchingUNet, SketchingUNet
from lesson_06_miniglide.upsampler import LOW_RES, UpsamplingUNet, draw_small, enlarge

IMAGE_SIZE = 64
GPT2_VOCABULARY = 50_257
GLIDE = ADMConfig(
    image_size=64,
    in_channels=3,
    out_channels=6,
    num_channels=192,
    channel_mult=(1, 2, 3, 4),
    num_res_blocks=3,
    attention_resolutions=(32, 16, 8),
    num_head_channels=64,
    groups=32,
)
GLIDE_TEXT = TextConfig(GPT2_VOCABULARY, context=128, width=512, layers=16, heads=8)
TINY = ADMConfig(
    image_size=IMAGE_SIZE // PATCH,
    in_channels=3 * PATCH**2,
    out_channels=6 * PATCH**2,
    num_channels=48,  # four times the numbers of a patch: what is noise and what is not has to pass through
    channel_mult=(1, 1, 4 / 3),
    num_res_blocks=1,
    attention_resolutions=(8,),
    num_head_channels=32,
    resblock_updown=False,
    groups=8,
)
SMALL = replace(
    TINY, image_size=LOW_RES, in_channels=3, out_channels=6, channel_mult=(1, 4 / 3), num_res_blocks=2
)
TINY_TEXT = TextConfig(1000, context=24, width=64, layers=2, heads=4)


def noisier_cosine_betas(num_timesteps, times=4):
    """The cosine schedule, every signal-to-noise ratio divided by `times` (Hoogeboom et al. 2023, section 3).

    The larger a picture is, the more of its pixels tell the same, and the more noise it takes to hide what is
    where: twice as high and wide, four times. Lesson 4's schedule was right for 32x32.
    """
    alpha_bar = (1 - cosine_betas(num_timesteps)).cumprod(0)
    return betas_of(alpha_bar / (alpha_bar + times * (1 - alpha_bar))).clamp(max=0.999)


class Preset(NamedTuple):
    network: ADMConfig
    text: TextConfig
    kind: type = TextUNet
    learning_rate: float = 1e-4
    batch_size: int = 32
    task: Callable = draw  # (diffusion, network, x_0) -> (x_0, what the network sees beside x_t)
    betas: Callable = cosine_betas
    sketching: int = 0  # steps in which the text learns to sketch first (sketch.py)
    optimizer: str = "adamw"

    @property
    def velocity(self):
        return issubclass(self.kind, VelocityUNet)

    @property
    def losses(self):
        """(L_hybrid, L_simple) at given t."""
        return (loss_velocity, loss_velocity_simple) if self.velocity else (loss_hybrid, loss_simple)


PRESETS = {
    "tiny": Preset(TINY, TINY_TEXT, PatchSketchingUNet, 6e-3, 128, draw, noisier_cosine_betas, 5000, "muon"),
    "tiny_small": Preset(SMALL, TINY_TEXT, SketchingUNet, 3e-3, 128, draw_small, sketching=5000),
    "tiny_upsampler": Preset(TINY, TINY_TEXT, UpsamplingUNet, 3e-3, 128, enlarge, linear_betas),
    "tiny_inpainting": Preset(
        TINY, TINY_TEXT, InpaintingUNet, 2e-3, 128, inpaint, noisier_cosine_betas, 5000, "muon"
    ),
    "report": Preset(replace(GLIDE, num_channels=96, num_head_channels=32), GLIDE_TEXT),
    "glide": Preset(GLIDE, GLIDE_TEXT),
}


def new_network(preset, network, text, alpha_bar=None):
    """The network of a preset's kind with these settings (ADMConfig, TextConfig).

    alpha_bar: [T] of the process, for those that predict a velocity. Raises ValueError if channels and heads
    or channels and groups do not fit together.
    """
    kind = PRESETS[preset].kind
    return kind(network, text, alpha_bar) if PRESETS[preset].velocity else kind(network, text)


def settings_of(config):
    """(ADMConfig, TextConfig) of the preset with what flags change. Raises UserError if they do not fit."""
    network, text, *_ = PRESETS[config.preset]
    network = changed(
        network,
        num_channels=config.num_channels,
        num_head_channels=config.num_head_channels,
        num_res_blocks=config.num_res_block,
    )
    text = changed(text, width=config.xf_width, layers=config.xf_layers, heads=config.xf_heads)
    if config.no_vlb:
        network = without_variance(network)
    try:
        with torch.device("meta"):
            new_network(config.preset, network, text, torch.ones(1))
    except ValueError as error:
        raise UserError(
            f"{error}; change --num-channels, --num-head-channels, --xf-width or --xf-heads"
        ) from None
    return network, text


def without_variance(network):
    return replace(network, out_channels=network.out_channels // 2)


def changed(settings, **flags):
    return replace(settings, **{name: value for name, value in flags.items() if value is not None})


def new_diffusion(timesteps, preset="tiny"):
    """The process of a preset. Raises UserError if its schedule has no place for so few timesteps."""
    try:
        return GaussianDiffusion(PRESETS[preset].betas(timesteps))
    except ValueError as error:
        raise UserError(f"--timesteps {timesteps}: {error}") from None


def rebuild(facts):
    """(network, diffusion) of a checkpoint's facts. Raises UserError."""
    if "network" not in facts:
        raise UserError("--checkpoint holds a network that does not draw")
    preset = facts["config"]["preset"]
    diffusion = new_diffusion(facts["config"]["timesteps"], preset)
    network = as_config(ADMConfig, facts["network"])
    text = as_config(OutsideConfig if is_outside(facts) else TextConfig, facts["text"])
    return new_network(preset, network, text, diffusion.alpha_bar), diffusion


def budget(network):
    """component -> parameters of a TextUNet."""
    unet, text = network.unet, network.text
    attention = [m for m in unet.modules() if hasattr(m, "text_kv")]
    parts = {
        "token embeddings": text.token_embedding,
        "text transformer": text,
        "sketch": getattr(network, "sketch", torch.nn.Module()),
        "text's keys and values": torch.nn.ModuleList(m.text_kv for m in attention),
        "attention of pixels": torch.nn.ModuleList(attention),
        "the rest of the UNet": network,
    }
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    counts["in all"] = counts["the rest of the UNet"]
    for part in ("text transformer", "sketch", "attention of pixels"):
        counts["the rest of the UNet"] -= counts[part]
    counts["text transformer"] -= counts["token embeddings"]
    counts["attention of pixels"] -= counts["text's keys and values"]
    return counts


@dataclass(frozen=True)
class Config:
    """Print where the parameters of the presets are."""

    preset: tyro.conf.Positional[str | None] = None  # one of the above; default all


def main(config):
    check_choice("preset", config.preset or "tiny", PRESETS)
    names = [config.preset] if config.preset else list(PRESETS)
    with torch.device("meta"):  # shapes without memory
        budgets = [budget(new_network(n, *PRESETS[n][:2], torch.ones(1000))) for n in names]
    print(f"{'':24}" + "".join(f"{name:>16}" for name in names))
    for part in budgets[0]:
        print(f"{part:24}" + "".join(f"{counts[part]:16,}" for counts in budgets))


if __name__ == "__main__":
    run_command(main, Config)
