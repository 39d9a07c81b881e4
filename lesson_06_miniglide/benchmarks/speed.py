"""Time a training step and a sampling step: python lesson_06_miniglide/benchmarks/speed.py lesson_03 report

Each network runs in a process of its own, and every round takes one step of each, so that whatever else the
machine does affects all of them alike. On a shared machine two runs may differ by a fifth.
"""

import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from common.cli import run_command
from common.device import check_compiler, keep_freed_memory, pick_device
from common.errors import UserError
from common.results.flops import flop_counter
from common.results.timing import synchronize
from common.training import trainer
from lesson_06_miniglide.benchmarks.cases import (
    IMAGE_SHAPES,
    STEPS,
    BenchmarkConfig,
    Case,
    Step,
    StepSettings,
    finish,
    load_adapter,
    make_adapter_case,
    make_case,
)
from lesson_06_miniglide.benchmarks.peak_rates import measure_peak_rates

PROCESS_STATUS = Path("/proc/self/status")  # on Linux
COLUMN_TITLES = {
    "network": "network",
    "work": "work",
    "batch": "batch",
    "gflop_per_image": "GFLOP per image",
    "seconds": ("seconds per step", ".3f"),
    "images_per_second": "images/s",
    "tflops": "TFLOP/s",
    "peak_fraction": ("of peak throughput", ".1%"),
    "memory_mb": ("peak memory, MB", ",.0f"),
}


@dataclass(frozen=True)
class Config(BenchmarkConfig):
    """Time a training step and a sampling step of each network, and measure the memory they need.

    The file of another implementation (--against) defines `build_network(image_shape)`, which returns a
    module, and `call(network, x_t, t)`, which returns its output. adapters/ has three.
    """

    against: tuple[str, ...] = ()  # adapter files; their networks get images like those of the first network
    compile: bool = False  # torch.compile every network
    cuda_graph: bool = False  # sampling on an NVIDIA GPU: record a step once, replay it without Python


@dataclass(frozen=True)
class Job:
    """One kind of step of one network at one batch size."""

    name: str  # of a network, or an adapter file
    work: str  # training or sampling
    batch_size: int
    config: Config


def build_case(name: str, config: Config, device: torch.device) -> Case:
    """Return the case of a network or of an adapter file. Raises UserError."""
    if name in config.against:
        return make_adapter_case(name, IMAGE_SHAPES[config.networks[0]], device)
    return make_case(name, device)


@cache
def prepare(job: Job) -> tuple[Step, int, float | None]:
    """Return a job's step, its network's parameters, and the peak memory in MB; called in the job's process.

    The memory is that of weights, gradients, optimizer and activations; None if it cannot be measured.
    """
    config, device = job.config, pick_device(job.config.device)
    if job.name in config.against:  # these have PyTorch's default
        trainer.keep_freed_memory = lambda: None
    else:
        keep_freed_memory()
    before = peak_bytes(device)
    case = build_case(job.name, config, device)
    settings = config.step_settings(job.batch_size, compile=config.compile, cuda_graph=config.cuda_graph)
    step = STEPS[job.work](case, settings)
    for _ in range(2):  # from the second step on, the optimizer's moments exist
        step()
    after, parameters = peak_bytes(device), sum(p.numel() for p in case.network.parameters())
    compiled_here = config.compile and device.type == "cpu"  # the compiler's own memory would count
    memory = None if before is None or after is None or compiled_here else (after - before) / 1e6
    return step, parameters, memory


def peak_bytes(device: torch.device) -> int | None:
    """Return the largest memory that this process has used so far; None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if device.type != "cpu" or not PROCESS_STATUS.exists():
        return None
    line = next(line for line in PROCESS_STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure_size(job: Job) -> tuple[int, float | None]:
    """Return the number of parameters and the peak memory in MB; called in the job's process."""
    return prepare(job)[1:]


def time_step(job: Job) -> float:
    """Take one step and return its seconds; called in the job's process."""
    step, device = prepare(job)[0], pick_device(job.config.device)
    synchronize(device)
    before = time.perf_counter()
    step()
    synchronize(device)
    return time.perf_counter() - before


@cache
def flops_per_image(name: str, work: str, config: Config) -> int:
    """Return the FLOPs of one step for one image, in fp32 and without recomputation."""
    step = STEPS[work](build_case(name, config, torch.device("cpu")), StepSettings(1, "fp32", device="cpu"))
    with flop_counter() as counter:
        step()
    return counter.get_total_flops()


def measure(jobs: Sequence[Job], rounds: int, peak_tflops: float) -> list[dict[str, Any]]:
    """Run jobs interleaved, each in a process of its own, and return a row per job."""
    with ExitStack() as stack:
        processes = [stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in jobs]
        pairs = list(zip(processes, jobs))
        sizes = [process.submit(measure_size, job).result() for process, job in pairs]
        seconds = [[process.submit(time_step, job).result() for process, job in pairs] for _ in range(rounds)]
    rows = []
    for job, (parameters, memory_mb), times in zip(jobs, sizes, zip(*seconds)):
        flops, median = flops_per_image(job.name, job.work, job.config), statistics.median(times)
        tflops = flops * job.batch_size / median / 1e12
        rows.append(
            {
                "network": Path(job.name).stem.removeprefix("against_"),
                "work": job.work,
                "batch": job.batch_size,
                "parameters": parameters,
                "gflop_per_image": flops / 1e9,
                "seconds": median,
                "slowest": max(times),
                "images_per_second": job.batch_size / median,
                "tflops": tflops,
                "peak_fraction": tflops / peak_tflops,
                "memory_mb": memory_mb,
            }
        )
    return rows


def main(config: Config) -> None:
    config.check()
    for path in config.against:
        load_adapter(path)
    device, names = pick_device(config.device), (*config.networks, *config.against)
    if config.cuda_graph and device.type != "cuda":
        raise UserError("--cuda-graph needs an NVIDIA GPU; leave it out")
    if config.compile:
        check_compiler(config.device)
    rates = measure_peak_rates(config.precision, device)
    rows = []
    for work in STEPS:
        jobs = [Job(name, work, n, config) for n in config.batch_size for name in names]
        rows += measure(jobs, config.rounds, rates.tflops)
    finish(config, rows, peak_rates=rates._asdict())


if __name__ == "__main__":
    run_command(main, Config)
