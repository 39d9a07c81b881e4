"""What every sample.py shares: its flags, running a sampler in batches, and writing .png, .npz or .gif."""

from collections import deque
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from common.command import UserError, autocast, pick_device
from common.data import to_uint8
from common.pictures import frames_of, save_gif, save_grid
from common.runs import load_weights, make_folder, write_atomically

ENDINGS = (".png", ".npz", ".gif")


@dataclass(frozen=True)
class SampleConfig:
    checkpoint: str | None = (
        None  # a .safetensors file or a run's folder; default: the lesson's shipped weights
    )
    steps: int = 50  # network evaluations a sample
    sampler: str = "ddpm"
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str = (
        "samples.png"  # .png: a picture; .npz: arrays `images` and `prompts`; .gif: the sampling itself
    )


def check_sampling(config, samplers):
    """Everything about the flags that can be wrong, before any work is done. Raises UserError."""
    if config.sampler not in samplers:
        later = {"ddim": "lesson 2", "dpm++": "lesson 5"}
        hint = f" ({config.sampler} comes in {later[config.sampler]})" if config.sampler in later else ""
        raise UserError(f"--sampler {config.sampler} is unknown here; choose {' or '.join(samplers)}{hint}")
    check_out(config.out)


def check_out(out):
    path = Path(out)
    if path.suffix not in ENDINGS:
        raise UserError(f"--out {out}: the name must end in {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}")
    make_folder(path.parent, "--out")
    if path.is_dir():
        raise UserError(f"--out {out} is a folder; name a file")


def load_for_sampling(config, lesson, folder, build):
    """The network of `config.checkpoint` (or of the weights shipped in `folder`) on its device, and its
    facts.

    build: facts -> network.
    """
    device = pick_device(config.device)
    weights, facts = load_weights(
        config.checkpoint or folder / "pretrained" / f"{lesson}.safetensors", lesson
    )
    network = build(facts)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(
            f"--checkpoint: its weights do not fit its settings ({str(error).splitlines()[0]})"
        ) from None
    return network.to(device).eval().requires_grad_(False), facts


def respaced(diffusion, steps):
    """`diffusion` at so many timesteps. Raises UserError if there are not so many."""
    try:
        return diffusion.evenly(steps)
    except ValueError as error:
        raise UserError(f"--steps {steps}: {error}") from None


def sample_batches(start, shape, n, seed, device, batch_size=250):
    """Run a sampler for n samples and return them on the CPU: [n, *shape].

    start: (indices of the samples, x_T, generator) -> the sampler's iterator of steps.
    """
    generator, device = torch.Generator().manual_seed(seed), pick_device(device)
    samples = []
    for indices in torch.arange(n).split(batch_size):
        x_T = torch.randn(len(indices), *shape, generator=generator).to(device)
        with torch.no_grad(), autocast(device):
            last = deque(start(indices, x_T, generator), maxlen=1).pop()
        samples.append(last.x_prev.float().cpu())
    return torch.cat(samples)


def sample_steps(start, shape, n, seed, device):
    """The same, keeping every step: for animations and strips of a few samples."""
    generator, device = torch.Generator().manual_seed(seed), pick_device(device)
    x_T = torch.randn(n, *shape, generator=generator).to(device)
    with torch.no_grad(), autocast(device):
        return [
            type(s)(s.t, *(x.float().cpu() for x in s[1:])) for s in start(torch.arange(n), x_T, generator)
        ]


def write_samples(config, start, shape, prompts, columns=8, **labels):
    """Draw a sample a prompt and write config.out by its ending."""
    n, path = len(prompts), Path(config.out)
    if path.suffix == ".gif":
        steps = sample_steps(start, shape, n, config.seed, config.device)
        write_atomically(path, lambda part: save_gif(part, frames_of(steps, columns)))
    else:
        images = sample_batches(start, shape, n, config.seed, config.device)
        if path.suffix == ".npz":
            pixels = to_uint8(images).permute(0, 2, 3, 1).numpy()
            write_atomically(
                path, lambda part: np.savez_compressed(part, images=pixels, prompts=np.array(prompts))
            )
        else:
            write_atomically(path, lambda part: save_grid(part, images, columns, **labels))
    print(f"{n} samples, {config.steps} steps of {config.sampler}: {path}")
