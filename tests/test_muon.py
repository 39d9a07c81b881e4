"""Muon, against a singular value decomposition, PyTorch's own Muon, and AdamW for all other parameters."""

import pytest
import torch
from torch import nn

from common.training.muon import Muon, newton_schulz
from common.training.optim import parameter_groups

SETTINGS = {"lr": 0.01, "weight_decay": 0.1}
MATRICES = ("linear.weight", "conv.weight")
LR_SCALES = {"text.": 0.03}


class Network(nn.Module):
    """Two matrices; a module with a smaller learning rate, biases, and an output of two rows."""

    def __init__(self, memory_format=torch.contiguous_format):
        super().__init__()
        torch.manual_seed(0)
        self.text, self.linear, self.conv = nn.Linear(20, 20), nn.Linear(24, 40), nn.Conv2d(16, 32, 3)
        self.out = nn.Conv2d(32, 2, 3)
        self.to(memory_format=memory_format)


def gradients(steps=5):
    """Return name -> gradient for each step, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    shapes = {name: weight.shape for name, weight in Network().named_parameters()}
    return [{n: torch.randn(shape, generator=generator) for n, shape in shapes.items()} for _ in range(steps)]


def changes(weights, optimizer, shape_of=lambda gradient: gradient, without=()):
    """Return name -> the change after the steps with `gradients`. without: names that get no gradient."""
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    for step in gradients():
        for name, weight in weights.items():
            weight.grad = None if name in without else shape_of(step[name]).clone()
        optimizer.step()
    return {name: weight.detach() - start[name] for name, weight in weights.items()}


def trained(optimizer_class, memory_format=torch.contiguous_format, **settings):
    network = Network(memory_format)
    optimizer = optimizer_class(parameter_groups(network, LR_SCALES), betas=(0.9, 0.99), **SETTINGS)
    return changes(dict(network.named_parameters()), optimizer, **settings)


@pytest.mark.parametrize("shape", [(32, 27), (27, 32), (64, 64), (16, 1152)])
def test_a_step_keeps_the_directions_and_makes_them_equally_long(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-4, 1.0, 1e3]).view(3, 1, 1)
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    along = u.mT @ newton_schulz(matrices) @ v.mT  # diagonal, if the singular vectors are still the same
    lengths = along.diagonal(dim1=1, dim2=2)
    torch.testing.assert_close(along, torch.diag_embed(lengths), rtol=0, atol=0.05)
    assert lengths.max() < 1.3 and (lengths > 0.6).float().mean() > 0.9


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_matrices_take_the_steps_of_pytorchs_muon(memory_format):
    """A convolution is the matrix of its flattened filters, whatever its memory format."""
    pytorchs = getattr(torch.optim, "Muon", None) or pytest.skip("this PyTorch has no Muon")
    flat = {n: w.detach().flatten(1).clone() for n, w in Network().named_parameters() if n in MATRICES}
    theirs = changes(
        flat, pytorchs(flat.values(), adjust_lr_fn="match_rms_adamw", **SETTINGS), lambda g: g.flatten(1)
    )
    ours = trained(Muon, memory_format)
    for name in MATRICES:
        assert (ours[name].flatten(1) - theirs[name]).norm() < 0.04 * theirs[name].norm()  # theirs is in bf16


def test_all_other_parameters_take_the_steps_of_adamw():
    ours, adamw = trained(Muon), trained(torch.optim.AdamW)
    for name in ours:
        assert torch.equal(ours[name], adamw[name]) == (name not in MATRICES)


def test_a_weight_without_a_gradient_stays_as_it_is():
    ours = trained(Muon, without=("conv.weight", "linear.bias"))
    assert [name for name, change in ours.items() if not change.any()] == ["linear.bias", "conv.weight"]
