"""What every sample.py shares: its flags, sampling in batches, and writing .png, .npz, .gif or a folder."""

import json
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from common.cli import PositiveInt, Seed, check_choice
from common.device import autocast, pick_device
from common.errors import UserError
from common.files import make_folder, write_atomically, write_text
from common.images import to_pixels
from common.plotting import plot_grid, sampling_frames, save_gif
from common.protocols import Denoiser, Model, NoiseStreams, Process, Sampler, SamplerStep

SUFFIXES = (".png", ".npz", ".gif")
# A sampler whose process is bound: (denoiser, x_T, generator) -> steps
BoundSampler: TypeAlias = Callable[..., Iterator[SamplerStep]]
# Indices of a batch's samples -> the denoiser for these samples
MakeDenoiser: TypeAlias = Callable[[Tensor], Denoiser]


@dataclass(frozen=True)
class SampleConfig:
    """Settings of sampling from a checkpoint."""

    checkpoint: str | None = None  # a .safetensors file or a run's folder; default: the pretrained weights
    steps: PositiveInt = 50  # network evaluations per sample
    sampler: str = "ddpm"  # name of the sampler
    seed: Seed = 0  # of the noise
    device: str = "auto"  # auto, cpu, cuda or mps
    # .png: a grid; .npz: arrays `images` and `prompts`; .gif: an animation of sampling; no suffix: a folder
    # of images and a metadata.jsonl with their captions
    out: str = "samples.png"


def load_sampler(
    config: SampleConfig, samplers: dict[str, Sampler], load: Callable[[str | None, str], Model]
) -> tuple[BoundSampler, Model]:
    """Check all flags, then load the model; return it with the sampler that the flags ask for.

    samplers: by name. load: (checkpoint, device) -> model. Raises UserError.
    """
    check_choice("--sampler", config.sampler, samplers)
    check_output_path(config.out)
    model = load(config.checkpoint, config.device)
    return respace_sampler(samplers[config.sampler], model.process, config.steps), model


def respace_sampler(sampler: Sampler, process: Process, steps: int) -> BoundSampler:
    """Bind a sampler to `steps` evenly spaced timesteps. Raises UserError if the process has fewer."""
    try:
        return partial(sampler, process.respace_evenly(steps))
    except ValueError as error:
        raise UserError(f"steps {steps}: {error}") from None


def check_output_path(out: str) -> None:
    """Raise UserError if samples could not be written to --out; create the folder it lies in."""
    path = Path(out)
    if not path.suffix:
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"--out {out} is a folder that is not empty; name a new one")
        return make_folder(path, "--out")
    if path.suffix not in SUFFIXES:
        suffixes = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(f"--out {out}: the name must end in {suffixes}, or have no suffix (a folder)")
    make_folder(path.parent, "--out")
    if path.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")


def initial_noise(n: int, shape: Sequence[int], generator: torch.Generator) -> Float[Tensor, "{n} ..."]:
    """Draw n samples of white noise of a shape, one after the other, so that they do not depend on n."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for _ in range(n)])


def sample_batches(
    sampler: BoundSampler,
    make_denoiser: MakeDenoiser,
    image_shape: tuple[int, ...],
    n: int,
    *,
    seed: int = 0,
    device: str = "cpu",
    batch_size: int = 250,
    on_step: Callable[[SamplerStep], object] | None = None,
) -> Float[Tensor, "{n} c h w"]:
    """Draw n samples in batches and return them on the CPU.

    Sample i of a seed has the same noise whatever n and the batch size are: its x_T is the i-th that is drawn
    from the seed, and later noise comes from a stream of its own (NoiseStreams).

    on_step: called with every step of the sampler, for instance to move a progress bar. Raises UserError if a
    sample has values that are not finite.
    """
    first_noise, torch_device = torch.Generator().manual_seed(seed), pick_device(device)
    batches = []
    for indices in torch.arange(n).split(batch_size):
        x_T = initial_noise(len(indices), image_shape, first_noise).to(torch_device)
        generator = NoiseStreams(seed, indices.tolist())
        with torch.no_grad(), autocast(torch_device):
            for step in sampler(make_denoiser(indices), x_T, generator):
                x = step.x_prev
                if on_step:
                    on_step(step)
        batches.append(x.float().cpu())
    samples = torch.cat(batches)
    finite = samples.isfinite().flatten(1).all(1)
    if not finite.all():
        broken = f"{(~finite).sum()} of {n} samples are not finite"
        raise UserError(
            f"{broken}; the checkpoint is broken, or a setting such as the guidance scale too large"
        )
    return samples


def sample_trajectory(
    sampler: BoundSampler,
    make_denoiser: MakeDenoiser,
    image_shape: tuple[int, ...],
    n: int,
    *,
    seed: int = 0,
    device: str = "cpu",
) -> list[SamplerStep]:
    """Draw n samples in one batch and return every step on the CPU, for animations and trajectory plots."""
    steps: list[SamplerStep] = []

    def keep(step: SamplerStep) -> None:
        steps.append(SamplerStep(step.t, *(x.float().cpu() for x in step[1:])))

    sample_batches(
        sampler, make_denoiser, image_shape, n, seed=seed, device=device, batch_size=n, on_step=keep
    )
    return steps


def last_sample(steps: Iterator[SamplerStep]) -> Tensor:
    """Run a sampler to its end and return the samples."""
    return deque(steps, maxlen=1).pop().x_prev


def write_npz(path: Path, images: Float[Tensor, "n c h w"], prompts: Sequence[str]) -> None:
    """Write arrays `images` (uint8 [N, H, W, C]) and `prompts` [N]."""
    pixels, texts = to_pixels(images), np.array(prompts)
    write_atomically(path, lambda part: np.savez_compressed(part, images=pixels, prompts=texts))


def write_folder(folder: Path, images: Float[Tensor, "n c h w"], prompts: Sequence[str]) -> None:
    """Write NNNN.png and metadata.jsonl, the imagefolder layout that lesson 6 can train on."""
    rows = [{"file_name": f"{i:04}.png", "text": prompt} for i, prompt in enumerate(prompts)]
    for row, pixels in zip(rows, to_pixels(images)):
        write_atomically(folder / row["file_name"], Image.fromarray(pixels.squeeze()).save)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_text(folder / "metadata.jsonl", "".join(lines))


def write_images(
    path: Path, images: Float[Tensor, "n c h w"], prompts: Sequence[str], columns: int = 8, **grid_kwargs: Any
) -> None:
    """Write samples in the format of the path's suffix, except .gif. grid_kwargs: for `plot_grid`."""
    if path.suffix == ".npz":
        write_npz(path, images, prompts)
    elif not path.suffix:
        write_folder(path, images, prompts)
    else:
        write_atomically(path, plot_grid(images, columns, **grid_kwargs).savefig)


def write_samples(
    config: SampleConfig,
    sampler: BoundSampler,
    make_denoiser: MakeDenoiser,
    image_shape: tuple[int, ...],
    prompts: Sequence[str],
    columns: int = 8,
    **grid_kwargs: Any,
) -> None:
    """Draw one sample per prompt and write config.out in the format of its suffix."""
    n, path = len(prompts), Path(config.out)
    seed, device = config.seed, config.device
    if path.suffix == ".gif":
        steps = sample_trajectory(sampler, make_denoiser, image_shape, n, seed=seed, device=device)
        write_atomically(path, lambda part: save_gif(part, sampling_frames(steps, columns)))
    else:
        images = sample_batches(sampler, make_denoiser, image_shape, n, seed=seed, device=device)
        write_images(path, images, prompts, columns, **grid_kwargs)
    print(f"{n} samples, {config.steps} steps of {config.sampler}: {path}")
