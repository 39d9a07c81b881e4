"""The trainer of the earlier lessons with what a larger network needs: several processes, micro-batches, a
precision by choice, checkpoints by the clock.

    torchrun --nproc-per-node 2 lesson_06_miniglide/train.py ...       the same flags, two GPUs
"""

import os
from contextlib import nullcontext
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from common.command import autocast, pick_device
from common.runs import find_state, load_state
from common.training import Trainer
from lesson_01_ddpm.unet import Layers
from lesson_04_text_conditioning.text_transformer import TransformerBlock

PRECISIONS = ("auto", "fp32", "bf16")


def join_processes(device):
    """(this process's number, how many there are) as torchrun says; (0, 1) without it.

    device: what --device says. Of several GPUs each process of a machine takes its own.
    """
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1 and not dist.is_initialized():
        on_gpu = pick_device(device).type == "cuda"
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patience = timedelta(days=1)  # while one process decodes a large data set
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=patience)
    return rank, world


def first_alone(prepare, *args):
    """prepare(*args) in a machine's first process, then in its others, which find what it has written."""
    first = int(os.environ.get("LOCAL_RANK", 0)) == 0
    result = prepare(*args) if first else None
    if dist.is_initialized():
        dist.barrier()
    return result if first else prepare(*args)


def autocast_to(precision, device):
    """precision: one of PRECISIONS."""
    if precision == "auto":
        return autocast(device)
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class WithLoss(nn.Module):
    """A network and its loss as one module: DistributedDataParallel sees what goes through `forward`."""

    def __init__(self, network, loss):
        super().__init__()
        self.network, self.loss = network, loss

    def forward(self, *batch):
        return self.loss(self.network, *batch).mean()


class BigTrainer(Trainer):
    """Trains with `config.batch_size` images at a time in each of `world` processes, `config.grad_accum`
    times a step.

    A step's images are drawn as for one process and dealt out, so that each is seen once an epoch. The first
    process alone has a `run` and writes. pictures: averaged network -> figure, every `config.sample_every`
    steps.
    """

    def __init__(self, network, loss, data, config, run, validation, metadata, pictures, rank=0, world=1):
        if config.compile:
            network = network.to(memory_format=torch.channels_last)  # as convolutions want it
        super().__init__(network, loss, data, config, run, validation, metadata, pictures)
        self.quiet, self.evaluated_at_once = rank > 0, config.batch_size
        self.rank, self.world = rank, world
        if rank > 0 and config.resume:
            self.restore(load_state(find_state(config.resume)))
        self.last_checkpoint = self.minutes
        if config.activation_checkpointing:
            checkpoint_activations(self.network)
        if config.compile:
            compile_network(self.network)
        self.with_loss = WithLoss(self.network, loss)
        if world > 1:
            self.with_loss = DistributedDataParallel(self.with_loss, broadcast_buffers=False)  # constants

    @property
    def images_a_step(self):
        return self.config.batch_size * self.config.grad_accum * self.world

    def backward(self, indices):
        """Gradients of the mean over the images of all processes."""
        micro_batches = indices[self.rank :: self.world].split(self.config.batch_size)
        total = 0.0
        for i, part in enumerate(micro_batches):
            batch = [x.to(self.device) for x in self.data.batch(part)]
            last = i == len(micro_batches) - 1
            wait = nullcontext() if last or self.world == 1 else self.with_loss.no_sync()
            with wait:
                with self.autocast():
                    loss = self.with_loss(*batch) / len(micro_batches)
                loss.backward()
            total += loss.detach()
        if self.world > 1:
            dist.all_reduce(total)
        return total / self.world

    def seed_step(self):
        """Each process has its own t and noise (of a seed torch's CPU generator keeps 32 bits)."""
        step = self.config.seed * 1_000_003 + self.step
        torch.manual_seed(step * self.world + self.rank)

    def autocast(self):
        return autocast_to(self.config.precision, self.device)

    def agree(self, minutes, caught):
        """The largest of all processes, so that all take the same learning rate and stop at the same step."""
        if self.world == 1:
            return minutes, caught
        both = torch.tensor([minutes, caught], dtype=torch.float64, device=self.device)
        dist.all_reduce(both, dist.ReduceOp.MAX)
        return both[0].item(), int(both[1].item())

    def checkpoint_is_due(self):
        """By steps, or by the minutes, on which all processes have agreed."""
        steps = self.config.checkpoint_every
        by_clock = 60 * (self.minutes - self.last_checkpoint) >= self.config.checkpoint_time
        return by_clock or (steps is not None and self.step % steps == 0)

    def validation_loss(self):
        """Each process computes it, so that none has to wait for another."""
        self.last_checkpoint = self.minutes
        return super().validation_loss()

    def checkpoint(self, validation_loss, show):
        super().checkpoint(validation_loss, show=False)

    def after_step(self):
        if self.run and self.step % self.config.sample_every == 0:
            self.save_picture()


def checkpoint_activations(network):
    """Keep only the inputs of each block for the way back, where the rest is computed again: less memory, up
    to a third more time (Chen et al. 2016). Blocks are the UNet's and the text transformer's."""
    for block in network.modules():
        if isinstance(block, Layers | TransformerBlock):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


def compile_network(network, **options):
    """torch.compile, which fuses what is done point by point; of the text encoder too, which a training step
    calls apart from the network. options: torch.compile's own."""
    network.compile(dynamic=False, **options)
    if hasattr(network, "text"):
        network.text.compile(dynamic=False, **options)
