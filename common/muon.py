"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon): AdamW, but each matrix takes a step that goes
equally far in all directions.

The gradient of a matrix is dominated by few directions, and so is what Adam makes of it. Muon averages the
gradients, U S V^T, and steps along U V^T: what is rare is learned as fast as what is frequent.
"""

import torch

from common.command import autocast

SMALLEST = 16  # rows and columns of what counts as a matrix


class Muon(torch.optim.AdamW):
    """groups: as AdamW takes them. In those that say `factor: 1`, weights of SMALLEST rows and columns or
    more are matrices (of a convolution a filter is a row); biases and what learns slowly are AdamW's.

    The step's root mean square is that of AdamW, 0.2 (Liu et al. 2025, arXiv 2502.16982, section 2.2), so a
    learning rate means the same for both.
    """

    def __init__(self, groups, momentum=0.95, **settings):
        super().__init__([part for group in groups for part in apart(group)], **settings)
        self.momentum = momentum

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
        state["average"].lerp_(weight.grad, 1 - self.momentum)
        return weight.grad.lerp(state["average"], self.momentum)


def apart(group):
    """The group's matrices, and the rest of it."""
    params = group["params"]
    matrices = [p for p in params if is_matrix(p)] if group["factor"] == 1 else []
    chosen = {id(p) for p in matrices}
    rest = [p for p in params if id(p) not in chosen]
    parts = {True: matrices, False: rest}
    return [group | {"params": part, "orthogonal": is_one} for is_one, part in parts.items() if part]


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
