"""The classic bugs of lesson 3. None of them crashes; `experiments.py` shows what each does."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from common.protocols import Denoiser


def loss_clean(
    classifier: nn.Module, x_0: Float[Tensor, "n c h w"], label: Int[Tensor, "n"]
) -> Float[Tensor, "n"]:
    """Return the cross entropy of clean digits, for each sample. The bug: the classifier never sees noise."""
    return cross_entropy(classifier(x_0, torch.zeros_like(label)), label, reduction="none")


def at_zero(classifier: nn.Module) -> Denoiser:
    """Return a classifier that is evaluated at t = 0, the only timestep that `loss_clean` trains."""
    return lambda x_t, t: classifier(x_t, torch.zeros_like(t))


def without_zero_init(network: nn.Module) -> nn.Module:
    """Initialize the layers that start at zero like all others. The bug: every residual branch adds noise."""
    for module in network.modules():
        if isinstance(module, nn.Conv1d | nn.Conv2d) and not module.weight.any():
            module.reset_parameters()
    return network
