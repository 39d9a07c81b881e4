"""Which pixels look at which token: the weights of a TextUNet's attention, recorded while it samples."""

from contextlib import contextmanager

import torch
from einops import rearrange

from lesson_04_text_conditioning.text_unet import TextAttention


def text_weights(layer, x, context):
    """How much each pixel looks at each token, mean over the heads: [N, context, H, W].

    layer: a TextAttention. x: its input [N, C, H, W]. context: the text's states [N, context, width]. What is
    missing to 1 in the sum over the tokens goes to the other pixels.
    """
    (q, k, _), (text_k, _) = layer.of_pixels(x), layer.keys_and_values(context)
    scores = q @ torch.cat([text_k, k], 2).transpose(2, 3) / q.shape[-1] ** 0.5
    weights = scores.softmax(-1)[..., : context.shape[1]].mean(1)
    return rearrange(weights, "n (h w) tokens -> n tokens h w", h=x.shape[2])


@contextmanager
def recorded(network, size=8):
    """Within it, every call of the network adds to the list it gives: the mean of `text_weights` over the
    layers at `size` x `size` pixels, [N, context, size, size].
    """
    layers = [m for m in network.modules() if isinstance(m, TextAttention)]
    calls, seen = [], []

    def record(layer, inputs):
        x, _, context = inputs
        if x.shape[2] == size:
            seen.append(text_weights(layer, x, context).float().cpu())

    def finish(network, inputs, output):
        calls.append(torch.stack(seen).mean(0))
        seen.clear()

    hooks = [layer.register_forward_pre_hook(record) for layer in layers]
    hooks.append(network.register_forward_hook(finish))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
