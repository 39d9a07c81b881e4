"""Muon, against a singular value decomposition, PyTorch's own Muon, and AdamW for all that is no matrix."""

from typing import ClassVar

import pytest
import torch
from torch import nn

from common.muon import Muon, orthogonal
from common.training import parameter_groups

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
MATRICES = ("linear.weight", "conv.weight")


class Network(nn.Module):
    """Two matrices; what learns slowly, biases, and an output of two rows."""

    slow: ClassVar = {"text": 0.03}

    def __init__(self, order=torch.contiguous_format):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.linear, self.conv = nn.Linear(20, 20), nn.Linear(24, 40), nn.Conv2d(16, 32, 3)
        self.out = nn.Conv2d(32, 2, 3)
        self.to(memory_format=order)


def gradients(steps=5):
    """name -> gradient, for each step the same whoever asks."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: weight.shape for name, weight in Network().named_parameters()}
    return [{n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for _ in range(steps)]


def changes(weights, optimizer, shape_of=lambda gradient: gradient, without=()):
    """name -> what the steps with `gradients` have changed. without: names that get none."""
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in gradients():
        for name, weight in weights.items():
            weight.grad = None if name in without else shape_of(step[name]).clone()
        optimizer.step()
    return {name: weight.detach() - start[name] for name, weight in weights.items()}


def trained(kind, order=torch.contiguous_format, **settings):
    network = Network(order)
    optimizer = kind(parameter_groups(network), betas=(0.9, 0.99), **SETTINGS)
    return changes(dict(network.named_parameters()), optimizer, **settings)


@pytest.mark.parametrize("shape", [(32, 27), (27, 32), (64, 64), (16, 1152)])
def test_a_step_keeps_the_directions_and_makes_them_equally_long(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e3]).view(3, 1, 1)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = u.mT @ orthogonal(matrices) @ v.mT  # diagonal, if the singular vectors are still the same
    lengths = along.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(along, torch.diag_embed(lengths), rtol=0, atol=0.05)
    assert lengths.max() < 1.3 and (lengths > 0.6).float().mean() > 0.9


@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_matrices_take_the_steps_of_pytorchs_muon(order):
    """A convolution is the matrix of its flattened filters, in whatever order they lie in memory."""
    theirs = getattr(torch.optim, "Muon", None) or pytest.skip("this PyTorch has no Muon")
    flat = {n: w.detach().flatten(1).clone() for n, w in Network().named_parameters() if n in MATRICES}
    them = changes(
        flat, theirs(flat.values(), adjust_lr_fn="match_rms_adamw", **SETTINGS), lambda g: g.flatten(1)
    )
    us = trained(Muon, order)
    for name in MATRICES:
        assert (us[name].flatten(1) - them[name]).norm() < 0.04 * them[name].norm()  # theirs is in bf16


def test_all_else_takes_the_steps_of_adamw():
    us, them = trained(Muon), trained(torch.optim.AdamW)
    for name in us:
        assert torch.equal(us[name], them[name]) == (name not in MATRICES)


def test_a_weight_without_a_gradient_stays_as_it_is():
    us = trained(Muon, without=("conv.weight", "linear.bias"))
    assert [name for name, change in us.items() if not change.any()] == ["linear.bias", "conv.weight"]
