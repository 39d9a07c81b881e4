"""What the trainer optimizes with: learning-rate schedule, parameter groups, averaged weights."""

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from common.training.muon import Muon

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"adamw": torch.optim.AdamW, "muon": Muon}


def learning_rate_factor(step: int, progress: float, warmup: int = 100) -> float:
    """Return a linear warm-up in steps times a cosine decay in the fraction of the budget used.

    Short runs warm up for the first 5 % of the budget.
    """
    warm = max((step + 1) / warmup, progress / 0.05)
    return min(1, warm) * (0.5 + 0.5 * math.cos(math.pi * progress))


class EMA:
    """A network whose weights are the exponential moving average of another one's."""

    def __init__(self, network: nn.Module, decay: float):
        self.network, self.decay = copy.deepcopy(network).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Move the average towards `network`; the decay warms up so that random weights are forgotten."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        for average, buffer in zip(self.network.buffers(), network.buffers()):
            average.copy_(buffer)


def parameter_groups(network: nn.Module, lr_scales: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return one optimizer group per learning-rate multiplier, without frozen parameters.

    lr_scales: prefix of parameter names -> multiplier; the first prefix that fits counts, and all other
    parameters have 1. Muon updates parameters with another multiplier than 1 like AdamW. Raises ValueError
    for a prefix that no parameter has.
    """
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    names = [name for name, _ in network.named_parameters()]
    for prefix in lr_scales:
        if not any(name.startswith(prefix) for name in names):
            raise ValueError(f"lr_scales: no parameter's name starts with {prefix!r}")
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = next((scale for prefix, scale in lr_scales.items() if name.startswith(prefix)), 1.0)
        groups.setdefault(scale, []).append(parameter)
    return [{"params": params, "lr_scale": scale} for scale, params in groups.items() if params]


def match_memory_format(optimizer: torch.optim.Optimizer) -> None:
    """Give each optimizer state the memory format of its parameter; a compiled run may have saved another."""
    for weight, state in optimizer.state.items():
        for name, moment in state.items():
            if moment.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(moment)
