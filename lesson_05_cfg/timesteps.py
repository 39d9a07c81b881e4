"""Which timesteps to train on, when not all are equally useful."""

import torch
from jaxtyping import Int
from torch import Tensor


def sample_noisy_timesteps(n: int, num_timesteps: int) -> Int[Tensor, "{n}"]:
    """Draw n timesteps, large ones more often: P(t < k) = (k / T)^(5/3), stratified within the batch.

    Digit and colour, all that a caption says, are decided at large t (for photos, Esser et al. 2024, section
    3.1, compare such densities). Stratification draws one u in each n-th of [0, 1], so that no batch misses a
    range of t by chance (as in Kingma et al. 2021, appendix I).
    """
    u = (torch.randperm(n) + torch.rand(n)) / n
    return (num_timesteps * u**0.6).long().clamp(max=num_timesteps - 1)
