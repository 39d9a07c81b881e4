"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): AdamW, except for matrices.

The gradient of a weight matrix is dominated by a few directions. Muon averages the gradients, writes the
average as U S V^T, and steps along U V^T, so that all directions are learned equally fast.
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from common.device import autocast

MOMENTUM = 0.95
MIN_MATRIX_DIM = 16  # smaller weights are not worth orthogonalizing


class Muon(torch.optim.AdamW):
    """AdamW for biases, small weights and slowly learning modules; orthogonalized momentum for matrices.

    groups: parameter groups as AdamW takes them, each with an `lr_scale`. In groups with lr_scale 1, weights
    with at least MIN_MATRIX_DIM rows and columns are matrices (of a convolution, each filter is a row). Steps
    have AdamW's typical root mean square, 0.2, so that learning rates are comparable (Liu et al. 2025, arXiv
    2502.16982, section 2.2).
    """

    def __init__(self, groups: list[dict[str, Any]], **adamw_kwargs: Any):
        super().__init__([part for group in groups for part in split_group(group)], **adamw_kwargs)

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # without AdamW's closure
        for group in self.param_groups:
            if group["orthogonal"]:
                for weights in group_by_shape(group["params"]):
                    self.muon_step(weights, group["lr"], group["weight_decay"])
        super().step()

    def muon_step(self, weights: list[nn.Parameter], lr: float, weight_decay: float) -> None:
        """Update weights of one shape, and clear their gradients so that AdamW skips them."""
        updates = torch.stack([self.nesterov_momentum(weight) for weight in weights]).flatten(2)
        rms = 0.2 * max(updates.shape[1:]) ** 0.5
        for weight, update in zip(weights, newton_schulz(updates)):
            weight.mul_(1 - lr * weight_decay).sub_(update.view_as(weight), alpha=lr * rms)
            weight.grad = None

    def nesterov_momentum(self, weight: nn.Parameter) -> Tensor:
        """Update the average of the weight's gradients; return it as it will be if the next one is equal."""
        assert weight.grad is not None
        state = self.state[weight]
        if not state:
            state |= {"step": torch.zeros(()), "average": torch.zeros_like(weight)}
        state["step"] += 1  # AdamW expects it when it loads a state
        state["average"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(state["average"], MOMENTUM)


def split_group(group: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the group's matrices and its other parameters, as one group each."""
    for matrices in (True, False):
        params = [p for p in group["params"] if (group["lr_scale"] == 1 and is_matrix(p)) == matrices]
        if params:
            yield group | {"params": params, "orthogonal": matrices}


def is_matrix(weight: Tensor) -> bool:
    """Return whether Muon treats this weight as a matrix."""
    return weight.ndim > 1 and min(weight.flatten(1).shape) >= MIN_MATRIX_DIM


def group_by_shape(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Return lists of the weights that have a gradient, one list per shape, to be updated in one batch."""
    by_shape: dict[torch.Size, list[nn.Parameter]] = {}
    for weight in weights:
        if weight.grad is not None:
            by_shape.setdefault(weight.shape, []).append(weight)
    return list(by_shape.values())


def newton_schulz(matrices: Float[Tensor, "k rows columns"]) -> Float[Tensor, "k rows columns"]:
    """Return the matrices with singular values of about 1 (0.7 to 1.2).

    Each of five iterations maps a singular value s to 3.4445 s - 4.7750 s^3 + 2.0315 s^5. The coefficients
    bring small values near 1 quickly; they do not converge to 1, which is not needed.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return newton_schulz(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    with autocast(x.device):
        for _ in range(5):
            squared = x @ x.mT
            factor = torch.baddbmm(squared, squared, squared, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.float()
