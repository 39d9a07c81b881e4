"""GroupNorm, and the scale and shift after it, as fast as the layers around them.

Under autocast a GPU computes norms in fp32 and hands fp32 on, twice the bytes. Here bf16 comes out
where bf16 goes in, as autocast has it on a CPU; the sums inside are in fp32 all the same.
"""

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import nn


class GroupNorm(nn.GroupNorm):
    """[N, C, H, W] -> the same. With a scale and a shift for each channel of each image, [N, C, 1, 1], AdaGN:
    scale GroupNorm(x) + shift (Dhariwal & Nichol 2021, section 3)."""

    def forward(self, x, scale=None, shift=None):
        if scale is None:
            return self.plain(x)
        if fits_in_one(x):
            return self.adaptive(x, scale, shift)
        return scale_and_shift(self.plain(x), scale, shift)

    def plain(self, x):
        if torch.compiler.is_compiling():
            return self.by_channels(x)
        if is_slow(x, self.num_groups):
            return self.in_one(x.contiguous()).contiguous(memory_format=torch.channels_last)
        return self.in_one(x)

    def in_one(self, x):
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps)

    def adaptive(self, x, scale, shift):
        """All images' channels as those of one image, whose norm's weight and bias can then be each image's
        own: one pass through memory in place of three, and two on the way back in place of six."""
        scale, shift = scale.flatten(1), shift.flatten(1)
        weight, bias = self.weight * scale, self.bias * scale + shift  # [N, C]
        one_image = x.reshape(1, -1, *x.shape[2:])
        groups = len(x) * self.num_groups
        return group_norm(one_image, groups, weight.flatten(), bias.flatten(), self.eps).view_as(x)

    def by_channels(self, x):
        """Of steps that a compiler fuses with what is around, in whatever order x lies. PyTorch's own wants
        the channels first: x would be turned round before each norm, and again for each convolution.

        The variance of a group is the mean of its channels' variances and the variance of their means.
        """
        var, mean = (
            moment.unflatten(1, (self.num_groups, -1))
            for moment in torch.var_mean(x.float(), (2, 3), correction=0)
        )
        var = var.mean(2, keepdim=True) + mean.var(2, correction=0, keepdim=True)
        scale = (var + self.eps).rsqrt() * self.weight.view_as(mean[0])
        shift = self.bias.view_as(mean[0]) - mean.mean(2, keepdim=True) * scale
        scale, shift = (part.flatten(1)[:, :, None, None] for part in (scale, shift))
        return (x * scale + shift).to(x.dtype)


def group_norm(x, groups, weight, bias, eps):
    with without_autocast(x.device.type):
        return F.group_norm(x, groups, weight.to(x.dtype), bias.to(x.dtype), eps)


def without_autocast(device_type):
    """A context. On "meta", where tensors have shapes alone, there is nothing to leave out."""
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def is_slow(x, groups):
    """Where PyTorch's GroupNorm takes up to eight times as long as with the channels first: on a CPU in bf16,
    with the channels last, of small pictures, for groups that do not fill its registers."""
    if x.device.type != "cpu" or x.dtype != torch.bfloat16 or not are_channels_last(x):
        return False
    return x.shape[2:].numel() < 1024 and x.shape[1] // groups % 16 > 0


def fits_in_one(x):
    """Where AdaGN can be one norm: with the channels first; on a GPU it was not tried."""
    return x.device.type == "cpu" and x.is_contiguous() and not torch.compiler.is_compiling()


def scale_and_shift(x, scale, shift):
    """x scale + shift, for x [N, C, H, W] and [N, C, 1, 1] each."""
    if are_channels_last(x):  # else one pass takes ten times as long as two, on a CPU
        return torch.addcmul(shift, x, scale)
    return x * scale + shift


def are_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
