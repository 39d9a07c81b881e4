"""Timing steps interleaved, so that whatever else the machine does affects all of them alike."""

import time
from collections.abc import Callable, Mapping

import torch


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has finished what was asked of it; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def time_interleaved(
    steps: Mapping[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Return name -> the seconds of each of `rounds` calls; every round calls each step once.

    A first round is not counted: memory is allocated in it, and code is compiled.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            synchronize(device)
            before = time.perf_counter()
            step()
            synchronize(device)
            if i:
                seconds[name].append(time.perf_counter() - before)
    return seconds
