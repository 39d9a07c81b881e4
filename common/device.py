"""The machine: which device to use, whether bf16 is fast on it, and what it is called in result files."""

import ctypes
import os
import platform
import sys
from pathlib import Path

import torch

from common.errors import UserError

CPU_INFO = Path("/proc/cpuinfo")
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def pick_device(name: str = "auto") -> torch.device:
    """Return the device called `name`; "auto" prefers CUDA, then MPS, then the CPU.

    Raises UserError if the device is not available.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name} cannot be used here ({reason}); try --device cpu") from None


def has_fast_bf16(device: str | torch.device) -> bool:
    """Return whether bf16 is faster than fp32: NVIDIA since Ampere, CPUs with AVX512-BF16 or AMX."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return device.type == "cpu" and (cpu_has("avx512_bf16") or cpu_has("amx_tile"))


def cpu_has(instructions: str) -> bool:
    """Return whether the CPU has these instructions, as far as this version of PyTorch can tell."""
    return getattr(torch.cpu, f"_is_{instructions}_supported", bool)()


def autocast(device: str | torch.device) -> torch.autocast:
    """Return an autocast context for bf16 where that is fast, else for fp32."""
    return torch.autocast(torch.device(device).type, torch.bfloat16, enabled=has_fast_bf16(device))


def check_compiler(device: str) -> None:
    """Compile a small function with torch.compile. Raises UserError if this machine cannot do it.

    device: the value of --device. A CPU needs a C++ compiler; a GPU needs Triton and a C compiler.
    """
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(8, device=pick_device(device)))
    except Exception as error:  # what its backends raise has no common class
        cause = getattr(error, "inner_exception", error)  # without advice for debugging torch.compile
        reason = f"{type(cause).__name__}: {' '.join(str(cause).split())[:200]}"
        remedy = "install a compiler (Debian, Ubuntu: apt-get install g++; macOS: xcode-select --install)"
        raise UserError(
            f"--compile cannot be used here ({reason}); {remedy}, or leave out --compile"
        ) from None


def keep_freed_memory() -> None:
    """Let this process keep the memory it frees, on Linux with glibc (elsewhere this does nothing).

    By default glibc returns large blocks to the system, which clears every page before it hands it out again.
    A training step allocates the same activations each time; keeping them saves 4 to 26 % of a step.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, -1)  # never shrink the heap
        mallopt(M_MMAP_MAX, 0)  # allocate everything on the heap, however large


def cpu_name() -> str:
    """Return the CPU's model name where Linux reports one, else its architecture."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def describe_machine(device: str = "auto") -> dict[str, str | int]:
    """Return hardware and versions for result files. `device` is the value of --device."""
    threads = torch.get_num_threads() * int(os.environ.get("WORLD_SIZE", 1))  # of all torchrun processes
    machine: dict[str, str | int] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": cpu_name(),
        "cpu_threads": threads,
    }
    if pick_device(device).type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name()
    return machine
