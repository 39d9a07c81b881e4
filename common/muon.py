"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): AdamW, but each matrix takes a step that goes
equally far in all directions.

In the gradient of a matrix few directions outweigh all others, they find, and in what Adam makes of it, too.
Muon averages the gradients, U S V^T, and steps along U V^T: what is rare is learned as fast as what is not.
"""

import torch

from common.command import autocast

MOMENTUM = 0.95
SMALLEST = 16  # rows and columns of what counts as a matrix


class Muon(torch.optim.AdamW):
    """groups: as AdamW takes them. In those that say `factor: 1`, weights of SMALLEST rows and columns or
    more are matrices (of a convolution a filter is a row); biases and what learns slowly are AdamW's.

    The step's root mean square is about AdamW's, 0.2 (Liu et al. 2025, arXiv 2502.16982, section 2.2), so
    learning rates are of the same order.
    """

    def __init__(self, groups, **settings):
        super().__init__([part for group in groups for part in apart(group)], **settings)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            if group["orthogonal"]:
                for weights in of_equal_shape(group["params"]):
                    self.step_of_matrices(weights, group["lr"], group["weight_decay"])
        super().step()

    def step_of_matrices(self, weights, lr, weight_decay):
        """weights: all of one shape, whose gradients are used up: AdamW leaves alone what has none."""
        gradients = torch.stack([self.with_momentum(weight) for weight in weights]).flatten(2)
        rms = 0.2 * max(gradients.shape[1:]) ** 0.5
        for weight, step in zip(weights, orthogonal(gradients)):
            weight.mul_(1 - lr * weight_decay).sub_(step.view_as(weight), alpha=lr * rms)
            weight.grad = None

    def with_momentum(self, weight):
        """Nesterov's: the average of the gradients, as it will be if the next one is like this one."""
        state = self.state[weight]
        if not state:
            state |= {"step": torch.zeros(()), "average": torch.zeros_like(weight)}
        state["step"] += 1  # AdamW wants one when it is loaded
        state["average"].lerp_(weight.grad, 1 - MOMENTUM)
        return weight.grad.lerp(state["average"], MOMENTUM)


def apart(group):
    """The group's matrices, and the rest of it, each as a group."""
    for matrices in (True, False):
        params = [p for p in group["params"] if (group["factor"] == 1 and is_matrix(p)) == matrices]
        if params:
            yield group | {"params": params, "orthogonal": matrices}


def is_matrix(weight):
    return weight.ndim > 1 and min(weight.flatten(1).shape) >= SMALLEST


def of_equal_shape(weights):
    """Lists of the weights that have a gradient: what is alike is computed at once."""
    alike = {}
    for weight in weights:
        if weight.grad is not None:
            alike.setdefault(weight.shape, []).append(weight)
    return alike.values()


def orthogonal(matrices):
    """[K, rows, columns] -> the same with singular values of about 1 (0.7 to 1.2), by Newton and Schulz.

    Each iteration replaces a singular value s by 3.4445 s - 4.7750 s^3 + 2.0315 s^5, which brings those below
    1 quickly near to it, and no nearer: exactness is not needed, speed is.
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonal(matrices.mT).mT
    x = matrices / (matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)  # no singular value above 1
    with autocast(x.device):
        for _ in range(5):
            squared = x @ x.mT
            factor = torch.baddbmm(squared, squared, squared, beta=-4.7750, alpha=2.0315)
            x = torch.baddbmm(x, factor, x, beta=3.4445)
    return x.float()
