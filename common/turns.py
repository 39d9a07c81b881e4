"""Steps timed in turns, so that whatever else the machine does strikes all alike."""

import time

import torch


def wait(device):
    """A GPU answers before it has finished."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def take_turns(steps, rounds, device):
    """name -> seconds of each of its steps. steps: name -> () -> None."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            wait(device)
            before = time.perf_counter()
            step()
            wait(device)
            if i:  # the first is slower: memory is not there yet, nothing is compiled
                seconds[name].append(time.perf_counter() - before)
    return seconds
