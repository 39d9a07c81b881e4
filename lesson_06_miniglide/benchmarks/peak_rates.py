"""The highest rates of this machine: TFLOP/s of a large matmul and GB/s of a copy."""

from functools import partial
from typing import NamedTuple

import torch

from common.results.timing import time_interleaved
from lesson_06_miniglide.training.distributed import autocast_to


class PeakRates(NamedTuple):
    """What the fastest of five matmuls and of five copies reached."""

    tflops: float
    copy_gb_per_second: float  # bytes read and bytes written


def measure_peak_rates(precision: str, device: torch.device) -> PeakRates:
    """Measure, print and return the rates. precision: as train.py's flag, "auto" or "fp32"."""
    with autocast_to(precision, device):
        in_bf16 = torch.is_autocast_enabled(device.type)
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16 if in_bf16 else torch.float32)
    source = torch.randn(64 * 1024**2, device=device)
    steps = {"matmul": partial(torch.mm, a, a), "copy": partial(torch.empty_like(source).copy_, source)}
    best = {name: min(seconds) for name, seconds in time_interleaved(steps, 5, device).items()}
    rates = PeakRates(2 * n**3 / best["matmul"] / 1e12, 2 * source.nbytes / best["copy"] / 1e9)
    print(f"{a.dtype}: {rates.tflops:.3g} TFLOP/s; copy: {rates.copy_gb_per_second:.3g} GB/s")
    return rates
