"""Memory that is freed is kept for what comes next.

glibc gives large pieces back to the system as soon as they are free, and the system fills every page with
zeros before a process may have it again. A training step frees all that it has computed, so without this the
next one waits for its memory anew.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory():
    """For the rest of this process, on Linux with glibc; elsewhere nothing happens."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(M_TRIM_THRESHOLD, -1)  # never hand back the end of the heap
        mallopt(M_MMAP_MAX, 0)  # nothing outside of the heap, however large
