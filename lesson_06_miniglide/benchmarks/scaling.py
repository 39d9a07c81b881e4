"""How FLOPs and memory grow with network and image size, and which batch fits a GPU.

    python lesson_06_miniglide/benchmarks/scaling.py

Nothing is computed: all tensors are fake, with shapes but without numbers. Counting 385 million parameters at
256x256 pixels takes seconds and no memory.
"""

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import tyro
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from common import layers
from common.cli import PositiveInt, check_choice, run_command
from common.errors import UserError
from common.files import make_folder
from common.results.flops import flop_counter
from lesson_06_miniglide.benchmarks.cases import finish, full_captions
from lesson_06_miniglide.model import build_network, unwrap
from lesson_06_miniglide.networks.presets import PRESETS
from lesson_06_miniglide.networks.upsampler import NoiseLevelConditioning
from lesson_06_miniglide.training.distributed import checkpoint_activations

GPU_GB = (8, 16, 24, 80)
USABLE = 0.9  # of a GPU's memory; the rest is for the workspace of kernels and for fragmentation
COLUMN_TITLES = {
    "network": "network",
    "image_size": "pixels per side",
    "gflop_per_image": "GFLOP per image",
    "fixed_gb": ("GB without images", ".2f"),
    "mb_per_image": ("MB per image", ",.0f"),
    "checkpointed_mb_per_image": ("with checkpointing", ",.0f"),
    "batch_in_8_gb": "batch in 8 GB",
    "batch_in_16_gb": "16 GB",
    "batch_in_24_gb": "24 GB",
    "batch_in_80_gb": "80 GB",
}


@dataclass(frozen=True)
class Config:
    """Count FLOPs and memory of presets, and the batch that fits a GPU without and with checkpointing."""

    presets: tyro.conf.Positional[tuple[str, ...]] = ("tiny", "report", "glide")  # networks, as in train.py
    image_size: tuple[PositiveInt, ...] = (64, 128, 256)  # pixels per side
    out: str | None = None  # a .json file for the numbers


class TrainingMemory(NamedTuple):
    """The GPU memory of a training step, in bytes."""

    fixed: int  # independent of the batch
    per_image: int

    def max_batch_size(self, gigabytes: float) -> int:
        """Return how many images fit into a GPU's memory per step; 0 if not even the weights do."""
        return max(0, int((USABLE * gigabytes * 1e9 - self.fixed) // self.per_image))


def training_memory(
    build_network: Callable[[], nn.Module], activation_checkpointing: bool = False
) -> TrainingMemory:
    """Estimate the GPU memory of training a text-conditional network with AdamW and bf16 autocast.

    build_network: called without arguments inside a FakeTensorMode; returns a network of lesson 6, such as
    `preset_network("glide")`. If it freezes parameters (`requires_grad_(False)`), these have no gradients and
    no moments, and layers that only depend on them keep no activations. On an H200, `report` needed 7 % more
    memory per image than estimated, which the margin in `max_batch_size` covers.
    """
    with FakeTensorMode(), fused_attention():
        network = build_network()
        if activation_checkpointing:
            checkpoint_activations(network)
        few, many = (peak_bytes(network, n) for n in (64, 128))
    total = sum(p.numel() for p in network.parameters())
    trainable = sum(p.numel() for p in network.parameters() if p.requires_grad)
    # fp32: a weight and its average; if it is trained, also its gradient and two moments
    return TrainingMemory(8 * total + 12 * trainable, (many - few) // 64)


def forward_flops(build_network: Callable[[], nn.Module]) -> int:
    """Return the FLOPs of one network evaluation for one image; its caption is encoded beforehand."""
    with FakeTensorMode(), fused_attention(), torch.no_grad():
        network = build_network()
        inputs = make_inputs(network, 1)
        text = network.encode_text(*full_captions(network, 1))  # type: ignore[operator]
        with flop_counter() as counter:
            network(*inputs[:2], text, **inputs[2])
    return counter.get_total_flops()


def preset_network(name: str, image_size: int | None = None) -> nn.Module:
    """Return a preset's network with random weights, by default for images of the preset's size.

    At another size the network has as many resolutions, and attention at the same sizes of feature maps.
    """
    preset = PRESETS[name]
    config = replace(preset.network, image_size=image_size or preset.network.image_size)
    return build_network(preset, config, preset.text, torch.ones(1000) / 2)


def fused_attention() -> Any:
    """Return a context in which attention keeps no table of weights, as on GPUs."""
    return patch.object(layers, "fused_attention_is_faster", lambda q: True)


def make_inputs(network: nn.Module, n: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return x_t, t and further inputs of a network for n images."""
    unet = unwrap(network)
    c, h, w = unet.image_shape
    t, more = torch.zeros(n, dtype=torch.long), {}
    if unet.upsample:
        more["low_res"] = torch.randn(n, c, h // 4, w // 4)
    if any(isinstance(module, NoiseLevelConditioning) for module in network.modules()):
        more["noise_level"] = t
    return torch.randn(n, c, h, w), t, more


class LiveBytes(TorchDispatchMode):
    """Counts the `bytes` of all tensors that are alive, and their `peak`."""

    def __init__(self, tensors: Iterable[Tensor]):
        super().__init__()
        self.seen, self.bytes, self.peak = WeakIdKeyDictionary(), 0, 0
        self.count(tensors)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = operation(*args, **(kwargs or {}))
        self.count(x for x in tree_leaves(result) if isinstance(x, Tensor))
        return result

    def count(self, tensors: Iterable[Tensor]) -> None:
        for storage in (x.untyped_storage() for x in tensors):
            if storage not in self.seen:  # a view shares the storage of another tensor
                self.seen[storage] = True
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.bytes)

    def forget(self, nbytes: int) -> None:
        self.bytes -= nbytes


def peak_bytes(network: nn.Module, n: int) -> int:
    """Return the peak memory of a forward and a backward pass: weights, activations, gradients."""
    x_t, t, more = make_inputs(network, n)
    captions = full_captions(network, n)
    with LiveBytes(network.parameters()) as live:
        with torch.autocast("cpu", torch.bfloat16):
            eps_hat = network(x_t, t, network.encode_text(*captions), **more)  # type: ignore[operator]
        eps_hat.float().square().mean().backward()
    network.zero_grad()
    return live.peak


def scaling_row(preset: str, image_size: int) -> dict[str, Any]:
    """Return FLOPs, memory and batch sizes of a preset at this image size.

    A batch size is a pair: without and with checkpointing of activations.
    """

    def build() -> nn.Module:
        return preset_network(preset, image_size)

    plain, checkpointed = (training_memory(build, checkpointing) for checkpointing in (False, True))
    row = {
        "network": preset,
        "image_size": image_size,
        "gflop_per_image": forward_flops(build) / 1e9,
        "fixed_gb": plain.fixed / 1e9,
        "mb_per_image": plain.per_image / 1e6,
        "checkpointed_mb_per_image": checkpointed.per_image / 1e6,
    }
    batches = {f"batch_in_{gb}_gb": [m.max_batch_size(gb) for m in (plain, checkpointed)] for gb in GPU_GB}
    return row | batches


def check(preset: str, image_size: int) -> None:
    """Raise UserError for an unknown preset, or for images that its network cannot halve often enough."""
    check_choice("preset", preset, PRESETS)
    network = PRESETS[preset].network
    if image_size % (divisor := network.patch_size * 2 ** (len(network.channel_mult) - 1)):
        raise UserError(f"--image-size {image_size}: {preset} needs a multiple of {divisor}")


def main(config: Config) -> None:
    pairs = [(preset, size) for preset in config.presets for size in config.image_size]
    for pair in pairs:
        check(*pair)
    if config.out:
        make_folder(Path(config.out).parent, "--out")
    finish(config, [scaling_row(*pair) for pair in pairs])


if __name__ == "__main__":
    run_command(main, Config)
