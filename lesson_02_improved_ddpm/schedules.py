"""The cosine schedule, and which timesteps to keep when sampling in fewer steps (Nichol & Dhariwal 2021)."""

import math

import torch


def cosine_betas(num_timesteps):
    """beta_t = min(1 - f((t+1)/T) / f(t/T), 0.999), f(u) = cos^2((u + 0.008) / 1.008 * pi / 2) (eq. 17)."""
    u = torch.arange(num_timesteps + 1, dtype=torch.float64) / num_timesteps
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=0.999)


def space_timesteps(num_timesteps, spec):
    """Which timesteps of 0 .. T-1 a respacing keeps, as an increasing list. Raises ValueError.


    spec: "250": so many, evenly; "10,15,20": so many of each equal section of the process, the cleanest
    first; "ddim50": every k-th from 0 (Song et al. 2021); "fast27": GLIDE's choice for its upsampler.
    """
    if spec.startswith("ddim"):
        return every_kth(num_timesteps, int(spec[4:]))
    if spec == "fast27":
        *kept, last = space_timesteps(num_timesteps, "10,10,3,2,2")
        return [*kept, num_timesteps - 3 if last == num_timesteps - 1 else last]
    counts = [int(count) for count in spec.split(",")]
    size, longer = divmod(num_timesteps, len(counts))
    kept, start = [], 0
    for i, count in enumerate(counts):
        section = size + (i < longer)
        kept += [start + offset for offset in spread(section, count)]
        start += section
    return kept


def spread(size, count):
    """`count` of 0 .. size - 1, first and last included.

    The position is accumulated step by step, as in the published code: where it falls between two timesteps,
    the rounding of the sum decides.
    """
    if not 1 <= count <= size:
        raise ValueError(f"cannot keep {count} of {size} timesteps")
    stride = (size - 1) / (count - 1) if count > 1 else 1
    kept, position = [], 0.0
    for _ in range(count):
        kept.append(round(position))
        position += stride
    return kept


def every_kth(num_timesteps, count):
    for k in range(1, num_timesteps + 1):
        if len(range(0, num_timesteps, k)) == count:
            return list(range(0, num_timesteps, k))
    raise ValueError(f"no stride takes exactly {count} of {num_timesteps} timesteps")
