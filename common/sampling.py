"""What every sample.py shares: its flags, running a sampler in batches, and writing .png, .npz or .gif."""

import json
from collections import deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.command import UserError, autocast, pick_device
from common.data import to_pixels
from common.pictures import frames_of, label_grid, save_gif
from common.runs import load_weights, make_folder, shipped_weights, write_atomically

ENDINGS = (".png", ".npz", ".gif")


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str | None = None  # a .safetensors file or a run's folder; default: the shipped weights
    steps: int = 50  # network evaluations a sample
    sampler: str = "ddpm"
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, mps
    # .png: a picture; .npz: arrays `images`, `prompts`; .gif: the sampling itself; no ending: a folder of
    # images and a metadata.jsonl with their captions
    out: str = "samples.png"


def load_for_sampling(config, lesson, samplers, rebuild):
    """What the flags ask for, each checked before any work is done: (sampler, network, facts).

    samplers: name -> (diffusion, denoiser, x_T, generator) -> steps; the first argument comes bound to
    `config.steps` timesteps. rebuild: the checkpoint's facts -> (network, diffusion). Raises UserError.
    """
    if config.sampler not in samplers:
        later = {"ddim": " (ddim comes in lesson 2)", "dpm++": " (dpm++ comes in lesson 5)"}
        choices = " or ".join(samplers) + later.get(config.sampler, "")
        raise UserError(f"--sampler {config.sampler} is unknown here; choose {choices}")
    check_out(config.out)
    network, diffusion, facts = load_network(config.checkpoint, lesson, rebuild, config.device)
    return in_steps(samplers[config.sampler], diffusion, config.steps), network, facts


def in_steps(sampler, diffusion, steps):
    """The sampler with so many timesteps, evenly spaced. Raises UserError."""
    try:
        return partial(sampler, diffusion.evenly(steps))
    except ValueError as error:
        raise UserError(f"--steps {steps}: {error}") from None


def load_network(checkpoint, lesson, rebuild, device="cpu"):
    """(network, diffusion, facts) of a checkpoint; None is the one that is shipped. Raises UserError.

    device: where the network shall be, as --device says it.
    """
    weights, facts = load_weights(checkpoint or shipped_weights(lesson), lesson)
    network, diffusion = rebuild(facts)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--checkpoint: its weights do not fit its settings ({reason})") from None
    network = network.to(pick_device(device), memory_format=torch.channels_last)  # a fifth faster in it
    return network.eval().requires_grad_(False), diffusion, facts


def check_out(out):
    path = Path(out)
    if not path.suffix:
        if path.is_dir() and any(path.iterdir()):
            raise UserError(f"--out {out} is a folder with something in it; name a new one")
        return make_folder(path, "--out")
    if path.suffix not in ENDINGS:
        endings = f"{', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}"
        raise UserError(f"--out {out}: the name must end in {endings}, or have no ending (a folder)")
    make_folder(path.parent, "--out")
    if path.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")


def sample_batches(sampler, denoiser_of, shape, n, config, batch_size=250):
    """Draw n samples in batches and return them on the CPU: [n, *shape].

    sampler: (denoiser, x_T, generator) -> steps. denoiser_of: (indices of a batch's samples) -> denoiser.
    config: with `seed` and `device`.
    """
    generator, device = torch.Generator().manual_seed(config.seed), pick_device(config.device)
    samples = []
    for indices in torch.arange(n).split(batch_size):
        x_T = torch.randn(len(indices), *shape, generator=generator).to(device)
        with torch.no_grad(), autocast(device):
            last = deque(sampler(denoiser_of(indices), x_T, generator), maxlen=1).pop()
        samples.append(last.x_prev.float().cpu())
    return torch.cat(samples)


def sample_steps(sampler, denoiser_of, shape, n, config):
    """The same, keeping every step: for animations and strips of a few samples."""
    generator, device = torch.Generator().manual_seed(config.seed), pick_device(config.device)
    x_T = torch.randn(n, *shape, generator=generator).to(device)
    with torch.no_grad(), autocast(device):
        steps = sampler(denoiser_of(torch.arange(n)), x_T, generator)
        return [type(step)(step.t, *(x.float().cpu() for x in step[1:])) for step in steps]


def write_npz(path, images, prompts):
    """`images` uint8 [N, H, W, C] and `prompts` [N]."""
    arrays = {"images": to_pixels(images), "prompts": np.array(prompts)}
    write_atomically(path, lambda part: np.savez_compressed(part, **arrays))


def write_folder(folder, images, prompts):
    """NNNN.png and metadata.jsonl, the imagefolder layout that lesson 6 can train on."""
    rows = [{"file_name": f"{i:04}.png", "text": prompt} for i, prompt in enumerate(prompts)]
    for row, image in zip(rows, to_pixels(images)):
        picture = Image.fromarray(image.squeeze())
        write_atomically(folder / row["file_name"], picture.save)
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(folder / "metadata.jsonl", lambda part: part.write_text(text, encoding="utf-8"))


def write_samples(config, sampler, denoiser_of, shape, prompts, columns=8, **labels):
    """Draw a sample a prompt and write config.out by its ending."""
    n, path = len(prompts), Path(config.out)
    if path.suffix == ".gif":
        frames = frames_of(sample_steps(sampler, denoiser_of, shape, n, config), columns)
        write_atomically(path, lambda part: save_gif(part, frames))
    else:
        write_images(path, sample_batches(sampler, denoiser_of, shape, n, config), prompts, columns, **labels)
    print(f"{n} samples, {config.steps} steps of {config.sampler}: {path}")


def write_images(path, images, prompts, columns=8, **labels):
    """Finished samples, by the ending of `path`, all but .gif."""
    if path.suffix == ".npz":
        write_npz(path, images, prompts)
    elif not path.suffix:
        write_folder(path, images, prompts)
    else:
        write_atomically(path, label_grid(images, columns, **labels).savefig)
