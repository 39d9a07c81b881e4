"""Conditioning as a tree of tensors: select, concatenate, expand, and guidance that accepts any such tree."""

from typing import NamedTuple

import pytest
import torch

from common.conditioning import batch_size, concatenate, expand, select
from lesson_05_cfg.guidance import cfg_denoiser, cfg_interval_denoiser


class Encoding(NamedTuple):
    pooled: torch.Tensor
    tokens: torch.Tensor


class Inputs(NamedTuple):
    text: Encoding
    images: list  # of tensors


def tensor(n, *shape, seed=0):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


def nested(n, seed=0):
    """A tree of every kind of node: a dict of a NamedTuple of a NamedTuple, a list and a tuple."""
    encoding = Encoding(tensor(n, 4, seed=seed), tensor(n, 3, 4, seed=seed + 1))
    inputs = Inputs(encoding, [tensor(n, 1, 2, 2, seed=seed + 2)])
    return {"inputs": inputs, "more": (tensor(n, seed=seed + 3), {"deep": tensor(n, 2, seed=seed + 4)})}


def leaves(tree):
    """The tensors of `nested`, read by hand."""
    inputs, (first, second) = tree["inputs"], tree["more"]
    return [inputs.text.pooled, inputs.text.tokens, inputs.images[0], first, second["deep"]]


def assert_same_types(tree, like):
    assert type(tree) is type(like) is dict and tree.keys() == like.keys()
    assert type(tree["inputs"]) is Inputs and type(tree["inputs"].text) is Encoding
    assert type(tree["inputs"].images) is list and type(tree["more"]) is tuple


def test_select_takes_the_same_samples_of_every_tensor():
    tree, indices = nested(5), torch.tensor([3, 0, 3])
    selected = select(tree, indices)
    assert_same_types(selected, tree)
    for before, after in zip(leaves(tree), leaves(selected)):
        assert torch.equal(after, torch.stack([before[3], before[0], before[3]]))


def test_concatenate_joins_two_batches():
    first, second = nested(2), nested(3, seed=10)
    joined = concatenate(first, second)
    assert_same_types(joined, first)
    for a, b, both in zip(leaves(first), leaves(second), leaves(joined)):
        assert torch.equal(both[:2], a) and torch.equal(both[2:], b)
    assert batch_size(joined) == 5


def test_concatenate_refuses_trees_that_differ():
    with pytest.raises(ValueError):
        concatenate({"text": tensor(2, 4)}, {"image": tensor(2, 4)})
    with pytest.raises(ValueError):
        concatenate({"text": tensor(2, 4)}, {"text": tensor(2, 4), "image": tensor(2, 4)})


def test_expand_repeats_one_sample_without_copying_it():
    tree = nested(1)
    expanded = expand(tree, 4)
    assert_same_types(expanded, tree)
    for before, after in zip(leaves(tree), leaves(expanded)):
        assert torch.equal(after, before.repeat(4, *[1] * (before.ndim - 1)))
        assert after.data_ptr() == before.data_ptr() and after.stride(0) == 0


def test_a_plain_tensor_is_a_tree_and_gradients_pass_through():
    x = tensor(3, 2).requires_grad_()
    assert torch.equal(select(x, torch.tensor([2, 1])), x[[2, 1]])
    assert torch.equal(concatenate(x, x), torch.cat([x, x]))
    assert torch.equal(expand(x[:1], 5), x[:1].expand(5, 2)) and batch_size(x) == 3
    concatenate(x, select(x, torch.tensor([0]))).sum().backward()
    assert x.grad.tolist() == [[2, 2], [1, 1], [1, 1]]


# -- guidance ------------------------------------------------------------------------------------------------


def from_tensor(code):
    return code


def from_dict(code):
    return {"code": code, "unused": torch.zeros(len(code), 7)}


def from_nested(code):
    return Inputs(Encoding(code[:, :1], code[:, None, 1:]), [torch.zeros(len(code), 1)])


def to_code(conditioning):
    """The inverse of the three functions above: [N, 2]."""
    if isinstance(conditioning, Inputs):
        return torch.cat([conditioning.text.pooled, conditioning.text.tokens[:, 0]], 1)
    return conditioning["code"] if isinstance(conditioning, dict) else conditioning


def network(x_t, t, conditioning):
    """eps_hat = a x_t + t / 100, and a second output, b x_t: a and b are the conditioning."""
    a, b = to_code(conditioning).view(-1, 2, 1, 1, 1).unbind(1)
    return torch.cat([a * x_t + t.view(-1, 1, 1, 1) / 100, b * x_t], 1)


@pytest.mark.parametrize("scale", [0, 0.5, 1, 3, 7.5])
@pytest.mark.parametrize("make", [from_tensor, from_dict, from_nested], ids=lambda make: make.__name__)
def test_guidance_accepts_any_tree(make, scale):
    x_t, t = tensor(4, 3, 2, 2), torch.tensor([5, 60, 700, 999])
    cond, uncond = tensor(4, 2, seed=1), tensor(4, 2, seed=2)
    output = cfg_denoiser(network, make(cond), make(uncond), scale)(x_t, t)
    for i in range(4):  # the formula, sample by sample
        with_caption, without = (c[i, 0] * x_t[i] + t[i] / 100 for c in (cond, uncond))
        torch.testing.assert_close(output[i, :3], without + scale * (with_caption - without))
        variance_of = uncond if scale == 0 else cond  # without captions, uncond is the only branch
        torch.testing.assert_close(output[i, 3:], variance_of[i, 1] * x_t[i])


def test_guidance_in_an_interval_accepts_any_tree():
    x_t, cond, uncond = tensor(2, 3, 2, 2), tensor(2, 2, seed=1), tensor(2, 2, seed=2)
    denoiser = cfg_interval_denoiser(network, from_nested(cond), from_nested(uncond), 3, (100, 200))
    for t, scale in ((99, 1), (100, 3), (200, 3), (201, 1)):
        t = torch.full((2,), t)
        expected = cfg_denoiser(network, cond, uncond, scale)(x_t, t)
        torch.testing.assert_close(denoiser(x_t, t), expected)
