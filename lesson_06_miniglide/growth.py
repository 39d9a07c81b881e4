"""What lesson 6's networks cost at any size, counted and not run: FLOPs, memory, the batch that fits a GPU.

Everything happens on fake tensors, which have shapes and no numbers: 385 million parameters at 256x256 pixels
take seconds and no memory.
"""

import weakref
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from common.flops import flop_counter
from lesson_01_ddpm import unet
from lesson_03_adm.adm_unet import MultiHeadAttention
from lesson_06_miniglide.big_trainer import checkpoint_activations
from lesson_06_miniglide.presets import IMAGE_SIZE, PRESETS, new_network

IMAGE_SIZES = (64, 128, 256)
GPU_GB = (8, 16, 24, 80)
BYTES_A_PARAMETER = 20  # fp32: the weight, its gradient, AdamW's two moments, its average
USABLE = 0.9  # of a GPU's memory: the rest goes to what a kernel needs for itself, and to gaps


class TrainingMemory(NamedTuple):
    """In bytes: whatever the batch, and for each image of it."""

    fixed: int
    an_image: int

    def batch_that_fits(self, gigabytes):
        """Images a training step can take at once in so much memory; 0 if not even the weights fit."""
        return max(0, int((USABLE * gigabytes * 1e9 - self.fixed) // self.an_image))


class Cost(NamedTuple):
    parameters: int
    flops: int  # of one call of the network for one image
    attention: dict  # pixels of a side -> FLOPs of the attention layers there
    plain: TrainingMemory
    checkpointed: TrainingMemory  # with checkpointing of activations


def cost(preset, image_size=IMAGE_SIZE):
    """The Cost of a preset on a GPU under bf16, for images of another size if asked.

    Its number of resolutions stays, and attention where it was in pixels: 256x256 is not halved down to 8x8.
    """
    with FakeTensorMode(), attention_in_one_kernel():
        network = network_for(preset, image_size)
        parameters = sum(p.numel() for p in network.parameters())
        flops, attention = count_flops(network, image_size)
        plain = training_memory(network, image_size)
        checkpoint_activations(network)
        return Cost(parameters, flops, attention, plain, training_memory(network, image_size))


@contextmanager
def attention_in_one_kernel():
    """As a GPU has it: no table of weights is kept."""
    rule, unet.suits_one_kernel = unet.suits_one_kernel, lambda q: True
    try:
        yield
    finally:
        unet.suits_one_kernel = rule


def training_memory(network, image_size):
    some, more = (counted_peak(network, image_size, n) for n in (64, 128))
    weights = BYTES_A_PARAMETER * sum(p.numel() for p in network.parameters())
    return TrainingMemory(weights, (more - some) // 64)


def network_for(preset, image_size):
    network, text, *_ = PRESETS[preset]
    patch = IMAGE_SIZE // network.image_size
    return new_network(preset, replace(network, image_size=image_size // patch), text, torch.ones(1000) / 2)


def inputs(network, image_size, n):
    """x_t, t, tokens, mask."""
    x_t = torch.randn(n, 3, image_size, image_size)
    tokens = torch.zeros(n, network.text_config.context, dtype=torch.long)
    return x_t, tokens[:, 0], tokens, tokens == 0


def count_flops(network, image_size):
    """(FLOPs of a call for one image, pixels of a side -> those of its attention layers)."""
    x_t, t, *caption = inputs(network, image_size, 1)
    text, before, attention = network.encode_text(*caption), {}, {}
    counter = flop_counter()

    def enter(layer, args):
        before[layer] = counter.get_total_flops()

    def leave(layer, args, output):
        side = output.shape[-1]
        attention[side] = attention.get(side, 0) + counter.get_total_flops() - before[layer]

    layers = [m for m in network.modules() if isinstance(m, MultiHeadAttention)]
    hooks = [m.register_forward_pre_hook(enter) for m in layers]
    hooks += [m.register_forward_hook(leave) for m in layers]
    with counter, torch.no_grad():
        network(x_t, t, text)
    for hook in hooks:
        hook.remove()
    return counter.get_total_flops(), attention


class Alive(TorchDispatchMode):
    """Counts the bytes of all that is computed, as long as it lives. `peak`: the most there were at once."""

    def __init__(self, tensors):
        super().__init__()
        self.seen, self.bytes, self.peak = WeakIdKeyDictionary(), 0, 0
        self.count(tensors)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        self.count(x for x in tree_leaves(result) if isinstance(x, torch.Tensor))
        return result

    def count(self, tensors):
        for storage in (x.untyped_storage() for x in tensors):
            if storage not in self.seen:  # a view lives where another tensor does
                self.seen[storage] = True
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.bytes)

    def forget(self, nbytes):
        self.bytes -= nbytes


def counted_peak(network, image_size, n):
    """The most that lives at once on the way forth and back for n images: weights, activations, gradients."""
    x_t, t, *caption = inputs(network, image_size, n)
    with Alive(network.parameters()) as alive:
        with torch.autocast("cpu", torch.bfloat16):
            eps_hat = network(x_t, t, network.encode_text(*caption))
        eps_hat.float().square().mean().backward()
    network.zero_grad()
    return alive.peak


def growth():
    """A row for each preset and size of image; the batches that fit without and with checkpointing."""
    rows = []
    for preset in ("tiny", "report", "glide"):
        for image_size in IMAGE_SIZES:
            found = cost(preset, image_size)
            plain, checkpointed = found.plain, found.checkpointed
            shares = {f"attention_{side}": found.attention.get(side, 0) / found.flops for side in (32, 16, 8)}
            fits = {f"fits_{gb}_gb": [m.batch_that_fits(gb) for m in (plain, checkpointed)] for gb in GPU_GB}
            rows.append(
                {
                    "network": preset,
                    "pixels": image_size,
                    "parameters": found.parameters,
                    "gflop_an_image": found.flops / 1e9,
                    **shares,
                    "gb_without_images": plain.fixed / 1e9,
                    "mb_an_image": plain.an_image / 1e6,
                    "mb_checkpointed": checkpointed.an_image / 1e6,
                    **fits,
                }
            )
    return rows
