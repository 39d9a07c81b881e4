"""The fast versions of layers against PyTorch's own: GroupNorm, attention, resampling."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from common import layers
from common.layers import (
    GroupNorm,
    attend,
    avg_pool_2x,
    fused_attention_is_faster,
    norm_needs_contiguous,
    resampling_needs_matmul,
    upsample_nearest_2x,
)

FORMATS = (torch.contiguous_format, torch.channels_last)
BF16 = {"rtol": 1.6e-2, "atol": 1.6e-2}  # two units in the last place


# -- GroupNorm -----------------------------------------------------------------------------------------------


def example(shape=(3, 24, 8, 6), dtype=torch.float32, memory_format=torch.contiguous_format):
    """Return a norm whose weights matter, and an input with mean 2 and standard deviation 3."""
    torch.manual_seed(0)
    norm, x = GroupNorm(4, shape[1]), 2 + 3 * torch.randn(shape)
    nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    return norm, x.to(dtype).to(memory_format=memory_format).requires_grad_()


def exact(norm, x):
    """Return the output and the gradients of x, weight and bias of PyTorch's norm, in float64."""
    reference = nn.GroupNorm(norm.num_groups, norm.num_channels).double()
    reference.load_state_dict(norm.state_dict())
    return forward_and_backward(reference, reference, x.detach().double().requires_grad_())


def forward_and_backward(norm, forward, x):
    output = forward(x)
    weights = torch.linspace(-1, 1, output.numel(), dtype=torch.float64).view(output.shape)
    total = (output.double() * weights).sum()
    return output, *torch.autograd.grad(total, (x, norm.weight, norm.bias))


def in_float64(tensors):
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize("memory_format", FORMATS)
def test_group_norm_and_its_gradients_are_pytorchs(memory_format):
    norm, x = example(memory_format=memory_format)
    results = forward_and_backward(norm, norm, x)
    torch.testing.assert_close(in_float64(results), in_float64(exact(norm, x)), rtol=1e-4, atol=1e-4)
    assert results[0].stride() == x.stride()


@pytest.mark.parametrize("memory_format", FORMATS)
def test_group_norm_returns_bf16_for_bf16_and_sums_in_fp32(memory_format):
    norm, x = example((2, 8, 16, 16), torch.bfloat16, memory_format)
    assert norm_needs_contiguous(x, 4) == (memory_format is torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        output = norm(x)
    assert output.dtype == torch.bfloat16 and output.stride() == x.stride()
    torch.testing.assert_close(output.double(), exact(norm, x)[0], **BF16)


def test_a_contiguous_copy_is_for_small_images_in_small_groups_on_a_cpu_in_bf16(monkeypatch):
    seen = []
    monkeypatch.setattr(layers.F, "group_norm", lambda x, *rest: seen.append(x.is_contiguous()) or x)
    for shape in ((2, 32, 8, 8), (2, 32, 32, 32), (2, 64, 8, 8)):  # groups of 8, of 8, of 16 channels
        for dtype in (torch.bfloat16, torch.float32):
            x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last)
            assert GroupNorm(4, shape[1])(x).is_contiguous(memory_format=torch.channels_last)
    assert seen == [True] + 5 * [False]


def test_a_large_mean_does_not_drown_the_variance():
    """The mean of squares minus the square of the mean would have no digit left."""
    norm, x = example()
    x = (x + 10_000).detach()
    torch.testing.assert_close(norm(x).double(), exact(norm, x)[0], rtol=0, atol=2e-2)


def test_a_compiler_sees_one_group_norm_and_no_copies(no_type_checks):
    torch.compiler.reset()  # other tests of this process may have reached the limit of recompilations
    norm, x = example((2, 8, 16, 16), torch.bfloat16, torch.channels_last)
    assert norm_needs_contiguous(x, 4)  # without a compiler
    seen = []

    def keep(graph, inputs):
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.testing.assert_close(torch.compile(norm, backend=keep, fullgraph=True)(x), norm(x), **BF16)
    assert sum("group_norm" in name for name in seen) == 1 and "contiguous" not in seen


def test_group_norm_takes_shapes_without_numbers():
    assert GroupNorm(4, 8).to("meta")(torch.empty(2, 8, 4, 4, device="meta")).shape == (2, 8, 4, 4)


# -- attention -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("queries", [64, 300])
def test_every_kernel_of_attention_is_one_softmax(queries, dtype):
    torch.manual_seed(0)
    q, k, v = (
        torch.randn(2, 3, n, 16, dtype=dtype).requires_grad_() for n in (queries, queries + 8, queries + 8)
    )
    assert fused_attention_is_faster(q) == (queries == 300 and dtype == torch.float32)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    weights = (exact[0] @ exact[1].mT / 4).exp()  # 4 is the root of d
    outputs = attend(q, k, v), weights @ exact[2] / weights.sum(-1, keepdim=True)
    gradients = [torch.autograd.grad(a.square().sum(), x) for a, x in zip(outputs, ((q, k, v), exact))]
    bounds = {"rtol": 3e-2, "atol": 3e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(outputs[0].double(), outputs[1], **bounds)
    for ours, expected in zip(*gradients):
        torch.testing.assert_close(ours.double(), expected, **bounds)
    torch.testing.assert_close(attend(*(x.detach() for x in (q, k, v))).double(), outputs[1], **bounds)


@pytest.mark.parametrize("amx", [True, False])
def test_in_bf16_the_fused_kernel_is_for_sampling_on_cpus_with_amx(amx, monkeypatch):
    monkeypatch.setattr(layers, "cpu_has", lambda instructions: amx and instructions == "amx_tile")
    q = torch.randn(1, 1, 300, 16, dtype=torch.bfloat16)
    assert fused_attention_is_faster(q) == amx
    assert not fused_attention_is_faster(q.requires_grad_())
    assert fused_attention_is_faster(q.to("meta"))  # not a CPU


# -- resampling ----------------------------------------------------------------------------------------------

PYTORCHS = {
    avg_pool_2x: lambda x: F.avg_pool2d(x, 2),
    upsample_nearest_2x: lambda x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("ours", PYTORCHS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (1, 5, 14, 14), (3, 1, 2, 2)])
def test_resampling_and_its_gradient_are_pytorchs(ours, dtype, shape):
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype).requires_grad_()
    assert resampling_needs_matmul(x) == (dtype == torch.bfloat16)
    outputs, gradients = zip(*(output_and_gradient(f, x) for f in (ours, PYTORCHS[ours])))
    bounds = {"rtol": 0, "atol": 0}
    if ours is avg_pool_2x:
        bounds = {"rtol": 8e-3, "atol": 4e-3}  # a unit of bf16
    torch.testing.assert_close(*outputs, **bounds)
    torch.testing.assert_close(*gradients, rtol=8e-3, atol=8e-3)


def output_and_gradient(function, x):
    """Return the output, and the gradient at x of a fixed weighted sum of it."""
    output = function(x)
    weights = torch.linspace(-1, 1, output.numel()).view_as(output).to(x.dtype)
    return output, torch.autograd.grad((output * weights).sum(), x)[0]


def test_resampling_with_channels_last_is_left_to_pytorch():
    x = torch.randn(2, 8, 4, 4, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    assert not resampling_needs_matmul(x)
    for ours, theirs in PYTORCHS.items():
        assert torch.equal(ours(x), theirs(x))
        assert ours(x).is_contiguous(memory_format=torch.channels_last)
