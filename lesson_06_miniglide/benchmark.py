"""How fast: python lesson_06_miniglide/benchmark.py lesson_03 report

Measures what this machine can do at best (a large matrix product, a copy), then a training step and a step of
sampling of each network named. In every round all of them take turns, so that whatever else the machine does
strikes all alike.

    lesson_01, lesson_03, lesson_05   what these lessons train on digits
    tiny, report, glide               presets of lesson 6

--growth times nothing: it counts what the presets cost at 64 to 256 pixels, and what batch fits which GPU,
without and with checkpointing of activations.

--data-dir, a folder of photos, also times how they are loaded, from the cache and decoded at each access, and
says what share of a training step is spent on it.

--against takes a .py file that stands for another implementation: with `new_network(image_shape)`, a module,
and `call(network, x_t, t)`, its eps_hat. against_diffusers.py and against_denoising_diffusion.py are two.
"""

import importlib.util
import multiprocessing
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import tyro
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from common.command import UserError, check_choice, pick_device, run_command
from common.experiments import aligned
from common.runs import describe_machine, write_json
from lesson_01_ddpm import train_mnist as lesson_1
from lesson_01_ddpm.diffusion import squared_error
from lesson_01_ddpm.unet import UNet
from lesson_03_adm import train_mnist as lesson_3
from lesson_03_adm.adm_unet import ClassUNet
from lesson_04_text_conditioning import captioned_mnist
from lesson_06_miniglide import train
from lesson_06_miniglide.big_trainer import BigTrainer, autocast_to
from lesson_06_miniglide.data_speed import data_rates
from lesson_06_miniglide.growth import growth
from lesson_06_miniglide.presets import IMAGE_SIZE, PRESETS, new_diffusion, new_network

STATUS = Path("/proc/self/status")
IMAGE_SHAPES = {
    "lesson_01": lesson_1.IMAGE_SHAPE,
    "lesson_03": lesson_1.IMAGE_SHAPE,
    "lesson_05": captioned_mnist.IMAGE_SHAPE,
} | dict.fromkeys(("tiny", "report", "glide"), (3, IMAGE_SIZE, IMAGE_SIZE))


@dataclass(frozen=True)
class Config:
    __doc__ = __doc__

    networks: tyro.conf.Positional[tuple[str, ...]] = ("lesson_03", "lesson_05", "tiny")
    against: tuple[str, ...] = ()  # adapter files; their networks get images like the first network's
    batch_size: tuple[int, ...] = (8,)  # several: each is timed
    data_dir: str | None = None  # photos to load, as train.py takes them
    dogs: bool = False  # they are Stanford Dogs
    growth: bool = False  # FLOPs and memory of the presets, counted and not timed
    rounds: int = 7  # steps timed of each network, after one that is not
    fp32: bool = False  # no bf16, where the machine is fast at it
    compile: bool = False  # all networks by torch.compile
    activation_checkpointing: bool = False  # of our own networks, as the flag of train.py
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str | None = None  # a .json for the numbers


class Contender(NamedTuple):
    """call: (x_t, t, *seen) -> [N, C or more, H, W]. see: (n) -> what n images come with beside x_t and t."""

    network: nn.Module
    image_shape: tuple
    call: Callable
    see: Callable = lambda n: ()


def contender(name, config):
    """The network of that name or adapter file, on the device. Raises UserError."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    if name not in config.against:
        return ours(name, device)
    adapter, image_shape = adapter_of(name), IMAGE_SHAPES[config.networks[0]]
    network = adapter.new_network(image_shape).to(device)
    return Contender(network, image_shape, partial(adapter.call, network))


def ours(name, device):
    shape = IMAGE_SHAPES[name]
    if name == "lesson_01":
        network = UNet(lesson_1.NETWORK).to(device)
        return Contender(network, shape, network)
    if name == "lesson_03":
        network = ClassUNet(lesson_3.NETWORK).to(device)
        return Contender(network, shape, network, lambda n: (torch.arange(n, device=device) % 10,))
    if name == "lesson_05":
        network, _ = captioned_mnist.new_network(captioned_mnist.train_tokenizer())
    else:
        network = new_network(name, *PRESETS[name][:2], new_diffusion(1000).alpha_bar)
    network, context = network.to(device), network.text_config.context

    def see(n):
        tokens = torch.arange(n * context, device=device).view(n, context) % network.text_config.vocab_size
        return (network.encode_text(tokens, torch.ones_like(tokens, dtype=torch.bool)),)

    return Contender(network, shape, network, see)


def adapter_of(path):
    """The module in a file. Raises UserError."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (AttributeError, OSError, ImportError, SyntaxError) as error:
        raise UserError(f"--against {path} cannot be used ({error})") from None
    for needed in ("new_network", "call"):
        if not hasattr(module, needed):
            raise UserError(f"--against {path} has no `{needed}`; benchmark.py's --help says what it needs")
    return module


class OneBatch:
    """What a trainer takes for its data."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def batch(self, indices):
        return self.tensors


def training_step(contender, config):
    """() -> None: a step of the trainer, with the squared error of eps_hat as its loss."""
    network, n = contender.network, config.batch_size
    x_t, noise = torch.randn(2, n, *contender.image_shape)

    def loss(network, x_t, t, noise):
        return squared_error(contender.call(x_t, t, *contender.see(n)), noise)

    is_ours = isinstance(getattr(network, "unet", network), UNet)
    settings = train.Config(
        batch_size=n,
        learning_rate=1e-3,
        precision=precision(config),
        activation_checkpointing=config.activation_checkpointing and is_ours,
        compile=config.compile,
        device=config.device,
    )
    data = OneBatch(x_t, torch.arange(n), noise)
    return partial(BigTrainer(network, loss, data, settings, None, None, {}, None).train_step, 0.0)


def sampling_step(contender, config):
    """() -> None: one call of the network. Text is read before, once a sample."""
    network = contender.network.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    if config.compile:
        network.compile()
    device = pick_device(config.device)
    x_t = torch.randn(config.batch_size, *contender.image_shape, device=device)
    t = torch.full((len(x_t),), 500, device=device)
    with torch.no_grad(), autocast_to(precision(config), device):
        seen = contender.see(len(x_t))

    def step():
        with torch.no_grad(), autocast_to(precision(config), device):
            contender.call(x_t, t, *seen)

    return step


WORK = {"training": training_step, "sampling": sampling_step}


def precision(config):
    return "fp32" if config.fp32 else "auto"


def wait(device):
    """A GPU answers before it has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def take_turns(steps, rounds, device):
    """name -> seconds of each of its steps. steps: name -> () -> None."""
    seconds = {name: [] for name in steps}
    for i in range(rounds + 1):
        for name, step in steps.items():
            wait(device)
            before = time.perf_counter()
            step()
            wait(device)
            if i:  # the first is slower: memory is not there yet, nothing is compiled
                seconds[name].append(time.perf_counter() - before)
    return seconds


def ceiling(config):
    """What the machine can do at best: TFLOP/s of a matrix product, GB/s of a copy."""
    device = pick_device(config.device)
    n = 8192 if device.type == "cuda" else 2048
    steps = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.randn(n, n, device=device, dtype=dtype)
        steps[str(dtype).split(".")[1]] = partial(torch.mm, a, a)
    source = torch.randn(64 * 1024**2, device=device)
    steps["copy"] = partial(torch.empty_like(source).copy_, source)
    best = {name: min(seconds) for name, seconds in take_turns(steps, 5, device).items()}
    copied = 2 * source.numel() * source.element_size()  # read, and written
    return {name: 2 * n**3 / s / 1e12 for name, s in best.items() if name != "copy"} | {
        "copy_gb_a_second": copied / best["copy"] / 1e9
    }


def flops_an_image(name, work, config):
    plain = replace(config, batch_size=1, compile=False, activation_checkpointing=False)
    step = WORK[work](contender(name, plain), plain)
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def peak_bytes(name, work, config):
    """The memory of one step: weights, gradients, optimizer, activations; in a process of its own."""
    device = pick_device(config.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        WORK[work](contender(name, config), config)()
        return torch.cuda.max_memory_allocated(device) - before
    if not STATUS.exists():
        return None  # only Linux says it
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(grown, (name, work, config))


def grown(name, work, config):
    before = resident_peak()
    WORK[work](contender(name, config), config)()
    return resident_peak() - before


def resident_peak():
    """The most memory that this process has had, in bytes."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def measure(work, config, best):
    """A row a contender, for one kind of work."""
    names, device = [*config.networks, *config.against], pick_device(config.device)
    contenders = {name: contender(name, config) for name in names}
    steps = {name: WORK[work](who, config) for name, who in contenders.items()}
    rows = []
    for name, seconds in take_turns(steps, config.rounds, device).items():
        median, flops = statistics.median(seconds), flops_an_image(name, work, config)
        peak = peak_bytes(name, work, config)
        images_a_second = config.batch_size / median
        rows.append(
            {
                "network": Path(name).stem,
                "work": work,
                "batch": config.batch_size,
                "parameters": sum(p.numel() for p in contenders[name].network.parameters()),
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


def show(rows):
    columns = list(rows[0])  # not all rows have all that the first has
    print(aligned([columns, *([row.get(name) for name in columns] for row in rows)]))


def grow(config):
    rows = growth()
    show(rows)
    if config.out:
        write_json(config.out, {"rows": rows})


def main(config):
    if config.growth:
        return grow(config)
    for name in config.networks:
        check_choice("network", name, IMAGE_SHAPES)
    for path in config.against:
        adapter_of(path)
    limits = ceiling(config)
    print("at best: " + ", ".join(f"{name} {value:.3g}" for name, value in limits.items()))
    device = pick_device(config.device)
    with autocast_to(precision(config), device):
        best = limits["bfloat16" if torch.is_autocast_enabled(device.type) else "float32"]
    batches = [replace(config, batch_size=n) for n in config.batch_size]
    rows = [row for work in WORK for batch in batches for row in measure(work, batch, best)]
    content = {"machine": describe_machine(), "at_best": limits, "rows": rows}
    if config.data_dir:
        content["images_a_second"] = rates = data_rates(config)
        for row in rows:
            if row["work"] == "training":
                loading = row["batch"] / rates["cache"]
                row["waits_for_data"] = loading / (loading + row["seconds"])
        print("images/s: " + ", ".join(f"{name} {value:,.0f}" for name, value in rates.items()))
    show(rows)
    if config.out:
        write_json(config.out, content)


if __name__ == "__main__":
    run_command(main, Config)
