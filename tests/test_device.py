"""The memory allocator: freed memory is used again without asking the system for it."""

import ctypes
import subprocess
import sys

import pytest

from tests.conftest import ROOT

HAS_MALLOPT = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt")

FAULTS = """
import resource, sys, torch
from common.device import keep_freed_memory

def step():
    "Allocates 20 tensors of 8 MB and one of 80, and frees them."
    kept = [torch.ones(2 << 20) for _ in range(20)] + [torch.ones(20 << 20)]

if sys.argv[1] == "kept":
    keep_freed_memory()
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(not HAS_MALLOPT, reason="no glibc")
def test_the_second_step_finds_the_memory_of_the_first():
    """Each page that the process asks the system for is a page fault."""

    def faults(memory):
        command = [sys.executable, "-c", FAULTS, memory]
        return int(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout)

    assert 10 * faults("kept") < faults("given back")
