"""Where a training step's time goes, and the least it could take on this machine (Williams et al. 2009).

Every operation that PyTorch carries out is timed as it passes, and its FLOPs and bytes are counted: what it
takes at least is its FLOPs at the machine's best rate or its bytes at the rate of a copy, whichever is more.
"""

import time
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.command import pick_device
from common.flops import flops_of
from common.turns import wait
from lesson_06_miniglide.contenders import contender, training_step

# kind -> what the names of its operations contain; the first that fits counts
KINDS = {
    "optimizer, average": ("_fused_adam", "_foreach"),  # clip_grad_norm_ comes as lists, too
    "attention": ("scaled_dot_product", "bmm", "softmax"),
    "convolutions": ("convolution",),
    "products": ("mm", "matmul", "aten.linear"),
    "norms": ("_norm",),
    "copies, other formats": ("_to_copy", "copy_", "clone", "contiguous", "aten.cat"),
}


def kind_of(operation):
    """operation: a name such as aten.convolution_backward."""
    names = (kind for kind, parts in KINDS.items() if any(part in operation for part in parts))
    return next(names, "all else, point by point")


@dataclass
class Account:
    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0  # read and written; what is in a cache already counts like all else


class Accounts(TorchDispatchMode):
    """kind -> its Account, of all that happens on that device inside this context."""

    def __init__(self, device):
        super().__init__()
        self.of, self.device = defaultdict(Account), device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        wait(self.device)
        before = time.perf_counter()
        result = operation(*args, **kwargs)
        wait(self.device)
        seconds = time.perf_counter() - before
        if not operation.is_view:
            account = self.of[kind_of(str(operation))]
            account.calls, account.seconds = account.calls + 1, account.seconds + seconds
            account.flops += flops_of(operation, args, kwargs, result)
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, torch.Tensor)]
            account.bytes += sum(x.numel() * x.element_size() for x in tensors)
        return result


def roofline(config, rate, bandwidth):
    """A row for each kind of operation of a training step of each network, and one for the whole step.

    rate: FLOP/s at best. bandwidth: bytes/s of a copy.
    """
    rows, device = [], pick_device(config.device)
    for name in config.networks:
        step = training_step(contender(name, config), config)
        step()  # memory is there, formats are chosen
        started = time.perf_counter()
        for _ in range(config.rounds):
            step()
        wait(device)
        whole = (time.perf_counter() - started) / config.rounds
        with Accounts(device) as accounts:
            for _ in range(config.rounds):
                step()
        of_step = {"network": name, "batch": config.batch_size}
        kinds = [of_step | row for row in rows_of(accounts.of, config.rounds, rate, bandwidth)]
        flops, least = (sum(row[key] for row in kinds) for key in ("gflop", "least_seconds"))
        total = {"kind": "the whole step, not watched", "seconds": whole, "gflop": flops}
        rows += [*kinds, of_step | total | {"least_seconds": least}]
    return rows


def rows_of(accounts, rounds, rate, bandwidth):
    """What one of so many rounds took, a row a kind, the slowest first. accounts: kind -> Account."""
    in_all = sum(account.seconds for account in accounts.values())
    for kind, account in sorted(accounts.items(), key=lambda item: -item[1].seconds):
        flops, moved = account.flops / rounds, account.bytes / rounds
        yield {
            "kind": kind,
            "calls": account.calls // rounds,
            "seconds": account.seconds / rounds,
            "of_the_step": account.seconds / in_all,
            "gflop": flops / 1e9,
            "gb": moved / 1e9,
            "flop_a_byte": flops / moved,
            "least_seconds": max(flops / rate, moved / bandwidth),
        }
