"""Which t to train on, when they need not all be alike."""

import torch


def mostly_large(n, num_timesteps):
    """n timesteps, the larger the more often, P(t < k) = (k / T)^(5/3), and spread evenly: int64 [n].

    Digit and colour, all that a caption says, are decided in the noise of large t (for photos, Esser et al.
    2024, section 3.1, compare such densities). Each n-th of [0, 1] gives one u: no batch misses a part of the
    way by chance (as Kingma et al. 2021 draw theirs, appendix I).
    """
    u = (torch.randperm(n) + torch.rand(n)) / n
    return (num_timesteps * u**0.6).long().clamp(max=num_timesteps - 1)
