"""The fast ways of halving and doubling against PyTorch's own."""

import pytest
import torch
import torch.nn.functional as F

from common.resample import double, halve, is_slow

WAYS = {halve: lambda x: F.avg_pool2d(x, 2), double: lambda x: F.interpolate(x, scale_factor=2)}


@pytest.mark.parametrize("ours", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 5, 14, 14), (3, 1, 2, 2)])
def test_either_way_is_the_same_there_and_back(ours, dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    assert is_slow(x) == (dtype == torch.bfloat16)
    answers, gradients = zip(*(there_and_back(way, x) for way in (ours, WAYS[ours])))
    bounds = {"rtol": 8e-3, "atol": 4e-3} if ours is halve else {"rtol": 0, "atol": 0}  # a unit of bf16
    torch.testing.assert_close(*answers, **bounds)
    torch.testing.assert_close(*gradients, rtol=8e-3, atol=8e-3)


def there_and_back(way, x):
    """(answer, the gradient at x of a fixed weighted sum of it)."""
    answer = way(x)
    weights = torch.linspace(-1, 1, answer.numel()).view_as(answer).to(x.dtype)
    return answer, torch.autograd.grad((answer * weights).sum(), x)[0]


def test_channels_that_come_last_are_left_to_pytorch():
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert not is_slow(x)
    for ours, theirs in WAYS.items():
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).is_contiguous(memory_format=torch.channels_last)
