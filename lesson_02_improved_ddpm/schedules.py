"""The cosine schedule, and the timesteps that respaced sampling keeps (Nichol & Dhariwal 2021)."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def cosine_betas(num_timesteps: int) -> Float[Tensor, "{num_timesteps}"]:
    """Return the betas of the cosine schedule (eq. 17).

    beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999) with f(u) = cos^2((u + 0.008) / 1.008 * pi/2).
    """
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def space_timesteps(num_timesteps: int, section_counts: str) -> list[int]:
    """Return the timesteps of 0 .. T-1 that a respacing keeps, in increasing order.

    section_counts: "250" keeps so many, evenly spaced; "10,15,20" keeps so many of each equal section of the
    process, least noisy first; "ddim50" keeps every k-th from 0 (Song et al. 2021); "fast27" is the choice of
    GLIDE's upsampler. Raises ValueError if there are not so many timesteps.
    """
    if section_counts.startswith("ddim"):
        return ddim_timesteps(num_timesteps, int(section_counts[4:]))
    if section_counts == "fast27":
        *kept, last = space_timesteps(num_timesteps, "10,10,3,2,2")
        return [*kept, num_timesteps - 3 if last == num_timesteps - 1 else last]
    counts = [int(count) for count in section_counts.split(",")]
    size, longer = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        section = size + (i < longer)
        kept += [start + offset for offset in spaced_indices(section, count)]
        start += section
    return kept


def spaced_indices(size: int, count: int) -> list[int]:
    """Return `count` of 0 .. size - 1, evenly spaced, the first and the last included.

    The position is accumulated step by step, as in the published code: halfway between two timesteps, the
    rounding error of the sum decides. Raises ValueError unless 1 <= count <= size.
    """
    if not 1 <= count <= size:
        raise ValueError(f"cannot keep {count} of {size} timesteps")
    stride = (size - 1) / (count - 1) if count > 1 else 1
    kept, position = [], 0.0
    for _ in range(count):
        kept.append(round(position))
        position += stride
    return kept


def ddim_timesteps(num_timesteps: int, count: int) -> list[int]:
    """Return every k-th timestep from 0, for the smallest k that gives `count`. Raises ValueError."""
    for k in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, k)) == count:
            return list(range(0, num_timesteps, k))
    raise ValueError(f"no stride takes exactly {count} of {num_timesteps} timesteps")
