"""Where the time of a training step goes, and the least it could take on this machine (Williams et al. 2009).

    python lesson_06_miniglide/benchmarks/roofline.py report

Every operation that PyTorch executes is timed, and its FLOPs and bytes are counted. The least time of an
operation is its FLOPs at the machine's peak rate or its bytes at the rate of a copy, whichever is longer.
"""

import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.cli import run_command
from common.device import pick_device
from common.results.flops import op_flops
from common.results.timing import synchronize, time_interleaved
from lesson_06_miniglide.benchmarks.cases import (
    BenchmarkConfig,
    StepSettings,
    finish,
    make_case,
    training_step,
)
from lesson_06_miniglide.benchmarks.peak_rates import PeakRates, measure_peak_rates

Row = dict[str, Any]
# Kind of operation -> what the names of its operations contain; the first that fits counts.
KINDS = {
    "optimizer, EMA": ("_fused_adam", "_foreach"),  # includes clip_grad_norm_
    "attention": ("scaled_dot_product", "bmm", "softmax"),
    "convolutions": ("convolution",),
    "matmuls": ("mm", "matmul", "aten.linear"),
    "norms": ("_norm",),
    "copies, layout changes": ("_to_copy", "copy_", "clone", "contiguous", "aten.cat"),
}
COLUMN_TITLES = {
    "network": "network",
    "batch": "batch",
    "kind": "operations",
    "calls": "calls",
    "seconds": ("seconds per step", ".3f"),
    "least_seconds": ("least seconds", ".3f"),
    "step_fraction": ("of the step", ".1%"),
    "gflop": ("GFLOP", ",.0f"),
    "gb": ("GB", ".2f"),
}


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Split the time of a training step by kind of operation, next to the least time each could take."""


def kind_of(operation: str) -> str:
    """Return the kind of an operation. operation: a name such as aten.convolution_backward."""
    names = (kind for kind, parts in KINDS.items() if any(part in operation for part in parts))
    return next(names, "elementwise and other")


@dataclass
class OpStats:
    """Totals of one kind of operation."""

    calls: int = 0
    seconds: float = 0.0
    flops: int = 0
    bytes: int = 0  # read and written, whether they come from a cache or from memory


class OpProfiler(TorchDispatchMode):
    """Collects `stats`, kind -> OpStats, of everything that runs on a device inside this context."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.stats: dict[str, OpStats] = defaultdict(OpStats)
        self.device = device

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        synchronize(self.device)
        before = time.perf_counter()
        result = operation(*args, **kwargs)
        synchronize(self.device)
        seconds = time.perf_counter() - before
        if not operation.is_view:
            stats = self.stats[kind_of(str(operation))]
            stats.calls, stats.seconds = stats.calls + 1, stats.seconds + seconds
            stats.flops += op_flops(operation, args, kwargs, result)
            stats.bytes += sum(
                x.numel() * x.element_size()
                for x in tree_leaves((args, kwargs, result))
                if isinstance(x, torch.Tensor)
            )
        return result


def profile_step(name: str, settings: StepSettings, rounds: int, rates: PeakRates) -> list[Row]:
    """Return a row per kind of operation of a network's training step, and one for the whole step."""
    device = pick_device(settings.device)
    step = training_step(make_case(name, device), settings)
    whole = statistics.fmean(time_interleaved({"step": step}, rounds, device)["step"])
    with OpProfiler(device) as profiler:
        for _ in range(rounds):
            step()
    total = sum(op.seconds for op in profiler.stats.values())
    rows: list[Row] = []
    for kind, op in sorted(profiler.stats.items(), key=lambda item: -item[1].seconds):
        gflop, gb = op.flops / rounds / 1e9, op.bytes / rounds / 1e9
        rows.append(
            {
                "kind": kind,
                "calls": op.calls // rounds,
                "seconds": op.seconds / rounds,
                "least_seconds": max(gflop / 1e3 / rates.tflops, gb / rates.copy_gb_per_second),
                "step_fraction": op.seconds / total,
                "gflop": gflop,
                "gb": gb,
            }
        )
    sums = {key: sum(row[key] for row in rows) for key in ("gflop", "least_seconds")}
    rows.append({"kind": "whole step, without profiler", "seconds": whole} | sums)
    return [{"network": name, "batch": settings.batch_size} | row for row in rows]


def main(config: Config) -> None:
    config.check()
    rates = measure_peak_rates(config.precision, pick_device(config.device))
    rows = []
    for n in config.batch_size:
        for name in config.networks:
            rows += profile_step(name, config.step_settings(n), config.rounds, rates)
    finish(config, rows, peak_rates=rates._asdict())


if __name__ == "__main__":
    run_command(main, Config)
