"""Layers whose fast version differs from PyTorch's default. Everything that only serves speed is here.

What each choice is worth was measured by lesson 6's benchmarks; see lesson_06_miniglide/benchmarks/README.md.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from common.device import cpu_has

FEW_QUERIES = 256  # up to here a table of attention weights is small


class GroupNorm(nn.GroupNorm):
    """Group normalization [N, C, H, W] -> [N, C, H, W] that returns bf16 for bf16.

    Under autocast, GPUs compute norms in fp32 and also return fp32, which doubles the memory traffic of the
    next layers. The sums inside are in fp32 in either case.
    """

    def forward(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        if norm_needs_contiguous(x, self.num_groups):
            return self.normalize(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return self.normalize(x)

    def normalize(self, x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h w"]:
        weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
        with autocast_off(x.device.type):
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def autocast_off(device_type: str) -> AbstractContextManager:
    """Return a context without autocast. The device "meta", which has shapes only, has no autocast."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def norm_needs_contiguous(x: Float[Tensor, "n c h w"], num_groups: int) -> bool:
    """Return whether PyTorch's GroupNorm is faster on a contiguous copy: small bf16 NHWC images on a CPU."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return False
    is_nhwc = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return is_nhwc and x.shape[2:].numel() < 1024 and x.shape[1] // num_groups % 16 > 0


def attend(
    q: Float[Tensor, "*batch queries d"], k: Float[Tensor, "*batch keys d"], v: Float[Tensor, "*batch keys d"]
) -> Float[Tensor, "*batch queries d"]:
    """Return softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, eq. 1) by the fastest kernel for the device."""
    if fused_attention_is_faster(q):
        return F.scaled_dot_product_attention(q, k, v)
    if q.shape[-2] > FEW_QUERIES:  # image by image: the weights of a whole batch would fill the memory
        return torch.stack([naive_attention(*one) for one in zip(q, k, v)])
    return naive_attention(q, k, v)


def naive_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q / q.shape[-1] ** 0.5 @ k.mT).softmax(-1) @ v


def fused_attention_is_faster(q: Tensor) -> bool:
    """Return whether PyTorch's fused kernel beats two matmuls and a softmax.

    It does on GPUs; on CPUs with AMX in bf16 without gradients; and on other CPUs in fp32 for many queries.
    """
    if q.device.type != "cpu":
        return True
    if q.dtype == torch.bfloat16:
        return cpu_has("amx_tile") and not q.requires_grad
    return q.shape[-2] > FEW_QUERIES


def avg_pool_2x(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c h//2 w//2"]:
    """Halve the resolution: each pixel is the mean of 2x2."""
    if not resampling_needs_matmul(x):
        return F.avg_pool2d(x, 2)
    n, c, h, w = x.shape
    two_rows = x.view(n, c, h // 2, 2 * w)
    return two_rows @ (repeat_columns(w // 2, x) / 4).T.repeat(2, 1)


def upsample_nearest_2x(x: Float[Tensor, "n c h w"]) -> Float[Tensor, "n c 2*h 2*w"]:
    """Double the resolution: each pixel becomes 2x2."""
    if not resampling_needs_matmul(x):
        return F.interpolate(x, scale_factor=2, mode="nearest")
    n, c, h, w = x.shape
    return (x @ repeat_columns(w, x).repeat(1, 2)).view(n, c, 2 * h, 2 * w)


def resampling_needs_matmul(x: Tensor) -> bool:
    """Return whether a matmul beats PyTorch's resampling (6 to 8 % of a step): bf16 NCHW on a CPU."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.is_contiguous()


def repeat_columns(width: int, like: Tensor) -> Float[Tensor, "{width} 2*{width}"]:
    """Return the matrix that repeats each of `width` columns."""
    return torch.eye(width, dtype=like.dtype, device=like.device).repeat_interleave(2, 1)
