"""The trainer of the earlier lessons, extended for larger networks: several processes, gradient accumulation,
a choice of precision, checkpoints by the clock.

    torchrun --nproc-per-node 2 lesson_06_miniglide/train.py ...       the same flags, two GPUs
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.device import autocast, pick_device
from common.protocols import Dataset, Loss
from common.training.trainer import Callback, Trainer
from lesson_01_ddpm.unet import TimestepEmbedSequential
from lesson_04_text_conditioning.text_transformer import TransformerBlock

PRECISIONS = ("auto", "fp32", "bf16")
Result = TypeVar("Result")


def init_distributed(device: str) -> tuple[int, int]:
    """Return this process's rank and the number of processes, as torchrun says; (0, 1) without it.

    device: the value of --device. Of several GPUs, each process of a machine takes its own.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        on_gpu = pick_device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        timeout = timedelta(days=1)  # while one process decodes a large data set
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timeout)
    return rank, world


def local_main_first(prepare: Callable[..., Result], *args: Any) -> Result:
    """Call prepare(*args) in a machine's first process, then in the others, which find what it wrote."""
    if first := int(os.environ.get("LOCAL_RANK", 0)) == 0:
        result = prepare(*args)
    if dist.is_initialized():
        dist.barrier()
    return result if first else prepare(*args)


def autocast_to(precision: str, device: torch.device) -> AbstractContextManager:
    """Return an autocast context for one of PRECISIONS."""
    if precision == "auto":
        return autocast(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class LossModule(nn.Module):
    """A network and its loss as one module: DistributedDataParallel sees what goes through `forward`."""

    def __init__(self, network: nn.Module, loss: Loss):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, *batch: Tensor) -> Tensor:
        return self.loss(self.network, *batch).mean()


class DDPTrainer(Trainer):
    """Trains on `config.batch_size` images in each of `world` processes, `config.grad_accum` times per step.

    config: lesson 6's, with precision, compile, activation_checkpointing and checkpoint_time.
    The images of a step are chosen as for one process and divided among all, so that each is seen once per
    epoch. Only the first process has callbacks.
    """

    config: Any

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        data: Dataset,
        config: Any,
        *,
        validation: tuple[Tensor, ...] | None = None,
        lr_scales: Mapping[str, float] | None = None,
        state: dict[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        rank: int = 0,
        world: int = 1,
    ):
        if config.compile:
            network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        super().__init__(
            network,
            loss,
            data,
            config,
            validation=validation,
            lr_scales=lr_scales,
            state=state,
            callbacks=callbacks if rank == 0 else (),
            quiet=rank > 0,
        )
        self.eval_batch_size = config.batch_size
        self.rank, self.world = rank, world
        self.minutes_of_last_checkpoint = self.minutes
        if config.activation_checkpointing:
            checkpoint_activations(self.network)
        if config.compile:
            compile_network(self.network)
        self.loss_module: nn.Module = LossModule(self.network, loss)
        if world > 1:  # buffers are constants
            self.loss_module = DistributedDataParallel(self.loss_module, broadcast_buffers=False)

    @property
    def global_batch_size(self) -> int:
        return self.config.batch_size * self.config.grad_accum * self.world

    def backward(self, indices: Int[Tensor, "b"]) -> Tensor:
        """Leave the gradients of the mean over the images of all processes; return their mean loss."""
        micro_batches = indices[self.rank :: self.world].split(self.config.batch_size)
        total = torch.zeros((), device=self.device)
        for i, part in enumerate(micro_batches):
            batch = [x.to(self.device) for x in self.data.batch(part)]
            last = i == len(micro_batches) - 1
            with nullcontext() if last or self.world == 1 else self.loss_module.no_sync():  # type: ignore[operator]
                with self.autocast():
                    loss = self.loss_module(*batch) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        return total / self.world

    def seed_step(self) -> None:
        """Give each process its own timesteps and noise (torch's CPU generator keeps 32 bits of a seed)."""
        step = self.config.seed * 1_000_003 + self.step
        torch.manual_seed(step * self.world + self.rank)

    def autocast(self) -> AbstractContextManager:
        return autocast_to(self.config.precision, self.device)

    def sync_across_ranks(self, minutes: float, caught: int) -> tuple[float, int]:
        """Return the maximum over all processes, so that all have one learning rate and one last step."""
        if self.world == 1:
            return minutes, caught
        both = torch.tensor([minutes, caught], dtype=torch.float64, device=self.device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return both[0].item(), int(both[1].item())

    def checkpoint_is_due(self) -> bool:
        """Decide by steps, or by the minutes on which all processes agree."""
        steps = self.config.checkpoint_every
        by_clock = 60 * (self.minutes - self.minutes_of_last_checkpoint) >= self.config.checkpoint_time
        due = by_clock or (steps is not None and self.step % steps == 0)
        if due:
            self.minutes_of_last_checkpoint = self.minutes
        return due


def checkpoint_activations(network: nn.Module) -> None:
    """Keep only the inputs of each block for the backward pass and recompute the rest (Chen et al. 2016).

    This needs less memory and up to a third more time. Blocks are those of the UNet and of the transformer.
    """
    for block in network.modules():
        if isinstance(block, TimestepEmbedSequential | TransformerBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)  # type: ignore[method-assign]


def compile_network(network: nn.Module, **compile_kwargs: Any) -> None:
    """Compile the network with torch.compile, and its text encoder, which training calls on its own."""
    network.compile(dynamic=False, **compile_kwargs)
    for name, module in network.named_modules():
        if name.endswith("text_encoder"):
            module.compile(dynamic=False, **compile_kwargs)
