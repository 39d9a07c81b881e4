"""What each change that makes a step faster saves: the step with all of them, and with all but one.

Each runs in a process of its own, in which its change is undone for good.
"""

import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from functools import cache
from multiprocessing import get_context

import numpy as np
import torch

from common import norm, resample, training
from common.command import is_fast_at_bf16, pick_device
from common.memory import keep_freed_memory
from common.turns import take_turns, wait
from lesson_01_ddpm import unet
from lesson_06_miniglide import contenders
from lesson_06_miniglide.contenders import WORK, contender


def with_memory_given_back():
    training.keep_freed_memory = lambda: None


def with_plain_attention():
    """Scores, softmax and values one after another; a CPU heeds this, too."""
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def with_pictures_halved_from_place_to_place():
    resample.is_slow = lambda x: False


def with_channels_first():
    contenders.SAMPLING_FORMAT = torch.contiguous_format


def with_norms_as_pictures_come():
    norm.is_slow = lambda x, groups: False


def with_scales_after_norms():
    norm.fits_in_one = lambda x: False


def with_all_large_attention_in_one_kernel():
    unet.suits_one_kernel = lambda q: q.shape[-2] > unet.FEW_PLACES


MEMORY = "memory that is freed is kept"
UNDO = {
    MEMORY: with_memory_given_back,
    "attention in one kernel": with_plain_attention,
    "halving as a product": with_pictures_halved_from_place_to_place,
    "channels last": with_channels_first,
    "small pictures turned for norms": with_norms_as_pictures_come,
    "AdaGN as one norm": with_scales_after_norms,
    "attention in plain products": with_all_large_attention_in_one_kernel,
}
EVERYTHING, BF16, TEXT = "-", "bf16", "text read once a prompt"
PLAIN = "all of these, text still once"


def changes(name, work, config):
    """Names of those that make a difference to that kind of work of that network, there."""
    device = pick_device(config.device)
    is_cpu, in_bf16 = device.type == "cpu", is_fast_at_bf16(device) and not config.fp32
    queries = torch.empty(1024, 1, dtype=torch.bfloat16 if in_bf16 else torch.float32, device=device)
    in_products = not unet.suits_one_kernel(queries.requires_grad_(work == "training"))
    few_places = name not in ("report", "glide")
    are_idle = {
        "attention in one kernel": in_products or (is_cpu and few_places),  # plain as it is
        MEMORY: not is_cpu,
        "halving as a product": not (is_cpu and in_bf16 and work == "training"),
        "channels last": work == "training",
        "small pictures turned for norms": not (is_cpu and in_bf16 and work == "sampling"),
        "AdaGN as one norm": not (is_cpu and work == "training" and name != "lesson_01"),
        "attention in plain products": not in_products or few_places,
        BF16: not in_bf16,
        TEXT: work == "training" or name in ("lesson_01", "lesson_03"),
    }
    return [change for change in (*UNDO, BF16, TEXT, PLAIN) if not are_idle.get(change)]


@cache
def step_without(change, work, name, config):
    """() -> None: the step of a network, its change undone in all of this process."""
    undone = {*UNDO, BF16} if change == PLAIN else {change}
    if MEMORY not in undone:
        keep_freed_memory()
    for known in UNDO.keys() & undone:
        UNDO[known]()
    config = replace(config, fp32=config.fp32 or BF16 in undone)
    who = contender(name, config)
    if TEXT in undone:
        call, see = who.call, who.see
        who = who._replace(call=lambda x_t, t, *seen: call(x_t, t, *see(len(x_t))))
    return WORK[work](who, config)


def take_step(*what):
    step_without(*what)()
    wait(pick_device(what[-1].device))


def savings(config):
    """A row for each network, kind of work and change; the first of them has all changes."""
    return [row for name in config.networks for work in WORK for row in savings_of(name, work, config)]


def savings_of(name, work, config):
    device, rows, whole = pick_device(config.device), [], []
    with ExitStack() as processes:
        everything = step_in_process(processes, EVERYTHING, work, name, config)
        for change in changes(name, work, config):
            with ExitStack() as process:
                without = step_in_process(process, change, work, name, config)
                seconds = take_turns({EVERYTHING: everything, change: without}, config.rounds, device)
            whole += seconds[EVERYTHING]
            rows.append(saving(change, seconds[change], seconds[EVERYTHING]))
    of_step = {"network": name, "work": work, "batch": config.batch_size}
    return [of_step | row for row in (saving(EVERYTHING, whole, whole), *rows)]


def saving(change, seconds, whole):
    """A row: how much slower the step is without that change, round by round. whole: seconds with all."""
    low, median, high = np.quantile([a / b - 1 for a, b in zip(seconds, whole)], (0.25, 0.5, 0.75)).tolist()
    row = {"without": change, "seconds": statistics.median(seconds)}
    return row | {"slower": median, "slower_from": low, "slower_to": high}  # half of the rounds between


def step_in_process(processes, *what):
    """take_step(*what), in a process of its own as long as `processes`, an ExitStack, is open."""
    process = processes.enter_context(ProcessPoolExecutor(1, get_context("spawn")))
    return lambda: process.submit(take_step, *what).result()
