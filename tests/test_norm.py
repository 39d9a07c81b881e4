"""GroupNorm's ways, and the scale and shift after it, against PyTorch's own in float64."""

import pytest
import torch
from torch import nn

from common import norm
from common.norm import GroupNorm, is_slow, scale_and_shift

FORMATS = (torch.contiguous_format, torch.channels_last)
BF16 = {"rtol": 1.6e-2, "atol": 1.6e-2}  # two units


def example(shape=(3, 24, 8, 6), dtype=torch.float32, order=torch.contiguous_format):
    """(a norm with weights that matter, an input of some mean and spread)."""
    torch.manual_seed(0)
    ours, x = GroupNorm(4, shape[1]), 2 + 3 * torch.randn(shape)
    nn.init.normal_(ours.weight), nn.init.normal_(ours.bias)
    return ours, x.to(dtype).to(memory_format=order).requires_grad_()


def theirs(ours, x):
    """(answer, gradients of x, weight, bias) of PyTorch's, in float64."""
    exact = nn.GroupNorm(ours.num_groups, ours.num_channels).double()
    exact.load_state_dict(ours.state_dict())
    return there_and_back(exact, exact, x.detach().double().requires_grad_())


def there_and_back(norm, way, x):
    answer = way(x)
    weights = torch.linspace(-1, 1, answer.numel(), dtype=torch.float64).view(answer.shape)
    total = (answer.double() * weights).sum()
    return answer, *torch.autograd.grad(total, (x, norm.weight, norm.bias))


def in_float64(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("way", ["forward", "in_one", "by_channels"])
def test_each_way_is_pytorch_s_there_and_back(way, order):
    ours, x = example(order=order)
    answers = there_and_back(ours, getattr(ours, way), x)
    torch.testing.assert_close(in_float64(answers), in_float64(theirs(ours, x)), rtol=1e-4, atol=1e-4)
    assert answers[0].stride() == x.stride()


@pytest.mark.parametrize("order", FORMATS)
@pytest.mark.parametrize("way", ["forward", "by_channels"])
def test_bf16_gives_bf16_and_sums_in_fp32(way, order):
    ours, x = example((2, 8, 16, 16), torch.bfloat16, order)
    assert is_slow(x, 4) == (order is torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        answer = getattr(ours, way)(x)
    assert answer.dtype == torch.bfloat16 and answer.stride() == x.stride()
    torch.testing.assert_close(answer.double(), theirs(ours, x)[0], **BF16)


def test_turning_round_is_for_small_pictures_in_small_groups_on_a_cpu_in_bf16(monkeypatch):
    asked = []
    monkeypatch.setattr(norm.F, "group_norm", lambda x, *rest: asked.append(x.is_contiguous()) or x)
    for shape in ((2, 32, 8, 8), (2, 32, 32, 32), (2, 64, 8, 8)):  # groups of 8, of 8, of 16 channels
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
            assert GroupNorm(4, shape[1])(x).is_contiguous(memory_format=torch.channels_last)
    assert asked == [True] + 5 * [False]


def test_a_large_mean_does_not_drown_the_variance():
    """The mean of squares minus the square of the mean would have no digit left."""
    ours, x = example()
    x = (x + 10_000).detach()
    torch.testing.assert_close(ours.by_channels(x).double(), theirs(ours, x)[0], rtol=0, atol=2e-2)


def test_a_compiler_sees_the_way_by_channels():
    ours, x = example()
    seen = []

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.testing.assert_close(torch.compile(ours, backend=keep, fullgraph=True)(x), ours.by_channels(x))
    assert any("var_mean" in name for name in seen) and not any("group_norm" in name for name in seen)


def test_shapes_without_numbers_pass():
    assert GroupNorm(4, 8).to("meta")(torch.empty(2, 8, 4, 4, device="meta")).shape == (2, 8, 4, 4)


@pytest.mark.parametrize("order", FORMATS)
def test_adagn_is_a_scaled_and_shifted_norm_there_and_back(order):
    ours, x = example(order=order)
    scale, shift = torch.randn(2, 3, 24, 1, 1).unbind()
    asked = [ours.weight, ours.bias, x, scale.requires_grad_(), shift.requires_grad_()]
    weights = torch.linspace(-1, 1, x.numel()).view(x.shape)

    exact = [tensor.detach().double().requires_grad_() for tensor in asked]
    weight, bias, *of_image = exact
    wanted = of_image[1] * nn.functional.group_norm(of_image[0], 4, weight, bias) + of_image[2]
    for answer in (ours(x, scale, shift), scale_and_shift(ours(x), scale, shift)):
        assert answer.stride() == x.stride()
        gradients = torch.autograd.grad((answer * weights).sum(), asked)
        known = torch.autograd.grad((wanted * weights).sum(), exact, retain_graph=True)
        torch.testing.assert_close(in_float64((answer, *gradients)), [wanted, *known], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("order", FORMATS)
def test_adagn_in_bf16(order):
    ours, x = example((2, 8, 16, 16), torch.bfloat16, order)
    scale, shift = torch.randn(2, 2, 8, 1, 1, dtype=torch.bfloat16).unbind()
    with torch.autocast("cpu", torch.bfloat16):
        answer = ours(x, scale, shift)
    assert answer.dtype == torch.bfloat16 and answer.stride() == x.stride()
    wanted = scale.double() * theirs(ours, x)[0] + shift.double()
    assert (answer.double() - wanted).abs().max() < 0.02 * wanted.abs().max()


def test_adagn_of_all_images_is_one_norm_where_the_channels_come_first(monkeypatch):
    asked = []
    monkeypatch.setattr(norm.F, "group_norm", lambda x, groups, *_: asked.append((x.shape, groups)) or x)
    x, scale = torch.randn(2, 8, 6, 6), torch.randn(2, 8, 1, 1)
    GroupNorm(4, 8)(x, scale, scale)
    GroupNorm(4, 8)(x.to(memory_format=torch.channels_last), scale, scale)
    assert asked == [((1, 16, 6, 6), 8), ((2, 8, 6, 6), 4)]


@pytest.mark.parametrize("order", FORMATS)
def test_scale_and_shift_there_and_back(order):
    _, x = example(order=order)
    scale, shift = torch.randn(2, 3, 24, 1, 1).requires_grad_()
    answers = [way(x, scale, shift) for way in (scale_and_shift, lambda x, a, b: x * a + b)]
    gradients = [torch.autograd.grad(answer.square().sum(), (x, scale, shift)) for answer in answers]
    torch.testing.assert_close(answers[0], answers[1])
    torch.testing.assert_close(gradients[0], gradients[1])
    assert answers[0].stride() == x.stride()
