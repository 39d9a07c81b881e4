"""Run by test_lesson_06_training under torchrun: the gradients of one step, divided among two processes."""

import sys
from pathlib import Path

import torch

from lesson_06_miniglide.training.config import Config
from lesson_06_miniglide.training.distributed import DDPTrainer, init_distributed
from tests.test_lesson_06_training import Noised, loss_at_given_t, small_network


def gradients(batch_size, grad_accum, rank=0, world=1):
    settings = {"learning_rate": 0.0, "optimizer": "adamw", "device": "cpu", "precision": "fp32"}
    config = Config(batch_size=batch_size, grad_accum=grad_accum, **settings)
    trainer = DDPTrainer(small_network(), loss_at_given_t, Noised(), config, rank=rank, world=world)
    trainer.train_step(0.0)
    return torch.cat([p.grad.flatten() for p in trainer.network.parameters()])


if __name__ == "__main__":
    rank, world = init_distributed("cpu")
    result = gradients(4, 2, rank, world)
    if rank == 0:
        torch.save(result, Path(sys.argv[1]) / "gradients.pt")
