"""Write a trained network in the layout of OpenAI's files, which their code, glide-text2im, loads.

    python -m lesson_06_miniglide.networks.export_openai --checkpoint RUN --out dogs.pt

In glide-text2im, `model.load_state_dict(torch.load("dogs.pt"))` takes the place of `load_checkpoint`. If the
run changed the size of the network, `create_model_and_diffusion` needs the same sizes. In this series, the
file is for `sample.py --openai` or `--openai-upsampler`. The weights are the averaged ones, in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from common.cli import Bounds, run_command
from common.errors import UserError
from common.files import make_folder, write_atomically
from common.training.checkpoints import load_model, save_training_state
from lesson_04_text_conditioning.openai_checkpoints import weights_to_openai
from lesson_06_miniglide.image_data.tokenizers import GPT2_VOCABULARY
from lesson_06_miniglide.model import build_from_metadata, unwrap
from lesson_06_miniglide.networks.frozen_t5 import uses_t5
from lesson_06_miniglide.networks.presets import LESSON, PRESETS
from lesson_06_miniglide.networks.upsampler import NoiseLevelConditioning, num_noise_levels

NoiseLevel = Annotated[int, Bounds(0, float("inf"), "be a timestep, 0 or greater")]


@dataclass(frozen=True)
class Config:
    """Lesson 6: write a network of --preset glide or glide_upsampler in the layout of OpenAI's files."""

    checkpoint: str  # a run's folder or a .safetensors file
    out: str  # the file to write, a .pt
    # of an upsampler: the noise level that it is told of its input from now on; OpenAI's code tells it none
    noise_level: NoiseLevel = 0


@torch.no_grad()
def to_openai(network: nn.Module, noise_level: int = 0) -> dict[str, Tensor]:
    """Return a network's weights under the published names.

    network: a TextUNet, which may be wrapped in NoiseLevelConditioning. The embedding of the noise level is
    added to the pooled text embedding; that of a constant level becomes part of the bias of
    `transformer_proj`, which computes the pooled embedding.
    """
    weights = dict(unwrap(network).state_dict())
    if isinstance(network, NoiseLevelConditioning):
        bias = "text_encoder.proj.bias"
        weights[bias] = weights[bias] + network.embed_level(torch.tensor([noise_level]))[0]
    return {name: weight.contiguous() for name, weight in weights_to_openai(weights).items()}


def why_not(metadata: Mapping[str, Any]) -> str | None:
    """Return why glide-text2im could not use a checkpoint's network, or None if it can."""
    preset, network = PRESETS[metadata["config"]["preset"]], metadata["network"]
    if preset.velocity:
        return "predicts velocity and not noise"
    if uses_t5(metadata):
        return "has a frozen T5 as its text encoder"
    if network["out_channels"] != 2 * network["in_channels"]:
        return "does not learn its variance (--no-vlb)"
    if (vocab_size := metadata["text"]["vocab_size"]) != GPT2_VOCABULARY:
        return f"has a vocabulary of {vocab_size} tokens and not GPT-2's; train with --vocabulary"
    return None


def main(config: Config) -> None:
    out = Path(config.out)
    if out.suffix != ".pt":
        raise UserError(f"--out {out}: the name must end in .pt, like OpenAI's files")
    if out.exists():
        raise UserError(f"--out {out} exists already; name another file")
    network, process, metadata = load_model(config.checkpoint, LESSON, build_from_metadata)
    if reason := why_not(metadata):
        raise UserError(
            f"--checkpoint {config.checkpoint} has no place in OpenAI's layout: its network {reason}"
        )
    levels = num_noise_levels(process) if isinstance(network, NoiseLevelConditioning) else 1
    if not 0 <= config.noise_level < levels:
        raise UserError(
            f"--noise-level is {config.noise_level}; this network has levels from 0 to {levels - 1}"
        )
    weights = to_openai(network, config.noise_level)
    make_folder(out.parent, "--out")
    write_atomically(out, lambda part: save_training_state(part, weights))
    print(f"{sum(weight.numel() for weight in weights.values()):,} parameters in OpenAI's layout: {out}")


if __name__ == "__main__":
    run_command(main, Config)
