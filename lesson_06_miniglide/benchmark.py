"""How fast: python lesson_06_miniglide/benchmark.py lesson_03 report

Measures what this machine can do at best (a large matrix product, a copy), then a training step and a step of
sampling of each network named. In every round all of them take turns, so that whatever else the machine does
strikes all alike. Two runs of this command on a shared machine may differ by a fifth: compare within one.

    lesson_01, lesson_03, lesson_05   what these lessons train on digits
    tiny, report, glide               presets of lesson 6

--growth times nothing: it counts what the presets cost at 64 to 256 pixels, and what batch fits which GPU,
without and with checkpointing of activations.

--rounding times nothing either: it compares the losses of 50 steps in fp32 and in bf16.

--roofline shows where the time of a training step goes, by kind of operation, and the least that each could
take on this machine.

--savings times a step with each change undone that makes it faster, and with all of them undone, beside the
step with all of them; each in a process of its own, two in memory at once.

--data-dir, a folder of photos, also times how they are loaded, from the cache and decoded at each access, and
says what share of a training step is spent on it.

--against takes a .py file that stands for another implementation: with `new_network(image_shape)`, a module,
and `call(network, x_t, t)`, its eps_hat. against_diffusers.py, against_diffusers_text.py and
against_denoising_diffusion.py are three.
"""

import gc
import multiprocessing
import os
import statistics
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import torch
import torch._dynamo
import tyro

from common.command import UserError, as_flag, check_choice, is_fast_at_bf16, pick_device, run_command
from common.experiments import as_table
from common.flops import flop_counter
from common.runs import describe_machine, make_folder, write_json
from common.turns import take_turns
from lesson_06_miniglide.big_trainer import autocast_to
from lesson_06_miniglide.contenders import IMAGE_SHAPES, WORK, adapter_of, contender, precision
from lesson_06_miniglide.data_speed import data_rates
from lesson_06_miniglide.growth import growth
from lesson_06_miniglide.roofline import roofline
from lesson_06_miniglide.rounding import compare_losses
from lesson_06_miniglide.savings import MEMORY, savings, step_in_process

STATUS = Path("/proc/self/status")
MODES = ("growth", "rounding", "roofline", "savings")  # what is done in place of the table of times
SETTINGS = ("rounds", "fp32", "compile", "cuda_graph", "activation_checkpointing")  # kept beside the numbers


@dataclass(frozen=True)
class Config:
    __doc__ = __doc__

    networks: tyro.conf.Positional[tuple[str, ...]] = ("lesson_03", "lesson_05", "tiny")
    against: tuple[str, ...] = ()  # adapter files; their networks get images like the first network's
    batch_size: tuple[int, ...] = (8,)  # several: each is timed
    data_dir: str | None = None  # photos to load, as train.py takes them
    dogs: bool = False  # they are Stanford Dogs
    growth: bool = False  # FLOPs and memory of the presets, counted and not timed
    rounding: bool = False  # losses in fp32 and bf16, and no times
    roofline: bool = False  # a training step by kinds of operations, and the least time of each
    savings: bool = False  # what each change that makes a step faster saves
    rounds: int = 7  # steps timed of each network, after one that is not
    fp32: bool = False  # no bf16, where the machine is fast at it
    compile: bool = False  # all networks by torch.compile
    cuda_graph: bool = False  # sampling on an NVIDIA GPU: a call recorded once, replayed without Python
    activation_checkpointing: bool = False  # of our own networks, as the flag of train.py
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str | None = None  # a .json for the numbers


def ceiling(config):
    """What the machine can do at best: TFLOP/s of a matrix product, GB/s of a copy."""
    device = pick_device(config.device)
    large = 8192 if device.type == "cuda" else 2048
    size = {"float32": large, "bfloat16": large if is_fast_at_bf16(device) else 256}
    steps = {}
    for name, n in size.items():
        a = torch.randn(n, n, device=device, dtype=getattr(torch, name))
        steps[name] = partial(torch.mm, a, a)
    source = torch.randn(64 * 1024**2, device=device)
    steps["copy"] = partial(torch.empty_like(source).copy_, source)
    best = {name: min(seconds) for name, seconds in take_turns(steps, 5, device).items()}
    copied = 2 * source.numel() * source.element_size()  # read, and written
    products = {name: 2 * n**3 / best[name] / 1e12 for name, n in size.items()}
    return products | {"copy_gb_a_second": copied / best["copy"] / 1e9}


@cache
def flops_an_image(name, work, config):
    """Of one step for one image. config: with a batch of 1, in fp32, not compiled, nothing checkpointed."""
    step = WORK[work](contender(name, config), config)
    with flop_counter() as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(name, work, config):
    """The memory of a step: weights, gradients, optimizer, activations; in a process of its own."""
    if config.compile or not STATUS.exists():
        return None  # a compiler's own memory would count; and only Linux says it
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(grown, (name, work, config))


def grown(name, work, config):
    before = resident_peak()
    two_steps(name, work, config)
    return resident_peak() - before


def two_steps(name, work, config):
    """(the network, the step), taken twice: the second finds AdamW's moments there already."""
    who = contender(name, config)
    step = WORK[work](who, config)
    step()
    step()
    return who.network, step


def resident_peak():
    """The most memory that this process has had, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def ready(name, work, config, processes):
    """(the network, the step, its peak in bytes where that can be told).

    On a CPU others compute in processes of their own, which handle memory as PyTorch does by itself.
    """
    device = pick_device(config.device)
    if device.type != "cuda":
        if name in config.against:
            network = contender(name, config).network
            step = step_in_process(processes, MEMORY, work, name, config)
        else:
            network, step = two_steps(name, work, config)
        return network, step, peak_bytes(name, work, config)
    gc.collect()  # checkpointed networks before this one, which refer to themselves
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return *two_steps(name, work, config), torch.cuda.max_memory_allocated(device) - before


def measure(work, config, best):
    """A row a batch size and contender, for one kind of work."""
    names, device = [*config.networks, *config.against], pick_device(config.device)
    plain = Config(config.networks, config.against, batch_size=1, fp32=True, device=config.device)
    batches = [replace(config, batch_size=n) for n in config.batch_size]
    rows = []
    with ExitStack() as processes:
        all_ready = {(n, batch): ready(n, work, batch, processes) for batch in batches for n in names}
        timed = take_turns({which: step for which, (_, step, _) in all_ready.items()}, config.rounds, device)
    for (name, batch), seconds in timed.items():
        network, _, peak = all_ready[name, batch]
        median, flops = statistics.median(seconds), flops_an_image(name, work, plain)
        images_a_second = batch.batch_size / median
        rows.append(
            {
                "network": Path(name).stem,
                "work": work,
                "batch": batch.batch_size,
                "parameters": sum(p.numel() for p in network.parameters()),
                "gflop_an_image": flops / 1e9,
                "seconds": median,
                "slowest": max(seconds),
                "images_a_second": images_a_second,
                "tflops": flops * images_a_second / 1e12,
                "of_ceiling": flops * images_a_second / 1e12 / best,
                "peak_mb": peak and peak / 1e6,
            }
        )
    return rows


def limits_of(config):
    """(ceiling, the TFLOP/s of it in the precision that the networks compute in)."""
    limits, device = ceiling(config), pick_device(config.device)
    print("at best: " + ", ".join(f"{name} {value:.3g}" for name, value in limits.items()))
    with autocast_to(precision(config), device):
        return limits, limits["bfloat16" if torch.is_autocast_enabled(device.type) else "float32"]


def watch(batches):
    """What --out keeps of --roofline."""
    limits, best = limits_of(batches[0])
    bandwidth = 1e9 * limits["copy_gb_a_second"]
    return {"at_best": limits, "rows": [row for b in batches for row in roofline(b, 1e12 * best, bandwidth)]}


def time_all(config):
    """What --out keeps: what the machine can do at best, a row a network, kind of work and batch."""
    for path in config.against:
        adapter_of(path)
    rates = data_rates(config.data_dir, config.dogs, config.batch_size[0]) if config.data_dir else {}
    if rates:
        print("images/s: " + ", ".join(f"{name} {value:,.0f}" for name, value in rates.items()))
    limits, best = limits_of(config)
    rows = [row for work in WORK for row in measure(work, config, best)]
    for row in rows:
        if rates and row["work"] == "training":
            loading = row["batch"] / rates["cache"]
            row["waits_for_data"] = loading / (loading + row["seconds"])
    return {"at_best": limits, "images_a_second": rates, "rows": rows}


def check(config):
    """Raises UserError before anything is timed."""
    for name in config.networks:
        check_choice("network", name, IMAGE_SHAPES)
    asked = [as_flag(mode) for mode in MODES if getattr(config, mode)]
    if len(asked) > 1:
        raise UserError(f"{' and '.join(asked)} are different measurements; ask for one at a time")
    if asked and (config.against or config.data_dir):
        raise UserError(f"{asked[0]} is of our own networks alone; leave out --against and --data-dir")
    if config.roofline and config.compile:
        raise UserError("--roofline watches each operation, and --compile fuses them; leave out one of them")
    if config.rounding and (config.fp32 or not is_fast_at_bf16(pick_device(config.device))):
        raise UserError("--rounding needs a machine that is fast at bf16, and no --fp32")
    if config.cuda_graph and pick_device(config.device).type != "cuda":
        raise UserError("--cuda-graph needs an NVIDIA GPU; leave it out")
    if config.out:
        make_folder(Path(config.out).parent, "--out")


def main(config):
    check(config)
    torch._dynamo.config.recompile_limit = 100  # several networks of one class
    # oneDNN keeps 1,024 of the kernels that it writes for a CPU; several networks need more, 100 to 300 each
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "10000")
    batches = [replace(config, batch_size=n) for n in config.batch_size]
    if config.growth:
        content = {"rows": growth()}
    elif config.rounding:
        content = {"rows": [row for batch in batches for row in compare_losses(batch)]}
    elif config.savings:
        content = {"rows": [row for batch in batches for row in savings(batch)]}
    elif config.roofline:
        content = watch(batches)
    else:
        content = time_all(config)
    print(as_table(content["rows"], list(content["rows"][0])))
    if config.out:
        settings = {name: getattr(config, name) for name in SETTINGS}
        write_json(config.out, {"machine": describe_machine(config.device), "settings": settings, **content})


if __name__ == "__main__":
    run_command(main, Config)
