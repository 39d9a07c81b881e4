"""Attention maps: which positions of an image attend to which token, recorded while a network samples."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from lesson_04_text_conditioning.text_unet import TextAttention


def token_attention(
    layer: TextAttention, x: Float[Tensor, "n c h w"], context: Float[Tensor, "n length width"]
) -> Float[Tensor, "n length h w"]:
    """Return how much each position attends to each token, averaged over the heads.

    x, context: the layer's inputs. What the weights of the tokens lack to a sum of 1 goes to other positions.
    """
    (q, k, _), (text_k, _) = layer.project_qkv(x), layer.project_text(context)
    scores = q @ torch.cat([text_k, k], 2).transpose(2, 3) / q.shape[-1] ** 0.5
    weights = scores.softmax(-1)[..., : context.shape[1]].mean(1)
    return rearrange(weights, "n (h w) length -> n length h w", h=x.shape[2])


@contextmanager
def record_attention(network: nn.Module, size: int = 8) -> Iterator[list[Tensor]]:
    """Record attention maps in a list while the context is open.

    Each call of the network appends the mean of `token_attention` over its layers at size x size positions,
    [N, L, size, size].
    """
    layers = [m for m in network.modules() if isinstance(m, TextAttention)]
    calls: list[Tensor] = []
    maps: list[Tensor] = []

    def record(layer: Any, inputs: Any) -> None:
        x, _, context = inputs
        if x.shape[2] == size:
            maps.append(token_attention(layer, x, context).float().cpu())

    def finish(network: Any, inputs: Any, output: Any) -> None:
        calls.append(torch.stack(maps).mean(0))
        maps.clear()

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    hooks.append(network.register_forward_hook(finish))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
