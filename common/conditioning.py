"""Conditioning as a tree: the same operation on every tensor of nested tuples, lists and dicts."""

import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from common.protocols import Conditioning


def select(conditioning: Conditioning, indices: Int[Tensor, "b"]) -> Conditioning:
    """Return the conditioning of these samples: every tensor [N, ...] becomes [B, ...]."""
    return tree_map(lambda x: x[indices.to(x.device)], conditioning)


def concatenate(first: Conditioning, second: Conditioning) -> Conditioning:
    """Join the conditioning of two batches: tensors [N, ...] and [M, ...] become [N + M, ...].

    Raises ValueError if the two trees differ.
    """
    return tree_map(lambda a, b: torch.cat([a, b]), first, second)


def expand(conditioning: Conditioning, n: int) -> Conditioning:
    """Repeat the conditioning of one sample, [1, ...], for n samples, without copying it."""
    return tree_map(lambda x: x.expand(n, *x.shape[1:]), conditioning)


def batch_size(conditioning: Conditioning) -> int:
    """Return N of a tree of tensors [N, ...]."""
    return len(tree_leaves(conditioning)[0])
