"""Which data a run was trained on: a hash of what its data set holds, not of its name or of where it lies."""

from hashlib import sha256
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.protocols import Dataset


def data_fingerprint(data: Any) -> str | None:
    """Return a short hash of the arrays and of the lists of texts or numbers that a data set holds.

    These are the attributes of `data`, and of data sets among them. Single texts and numbers, such as names
    and folders, do not count. Returns None if there is nothing else, as when a data set computes its images.
    """
    found = sha256()
    nothing = found.hexdigest()
    add_attributes(found, data)
    return None if found.hexdigest() == nothing else found.hexdigest()[:16]


def add_attributes(found: Any, data: Any) -> None:
    """Add what a data set holds to the hash `found`."""
    for _, value in sorted(getattr(data, "__dict__", {}).items()):
        if isinstance(value, Tensor | np.ndarray | list | tuple | dict):
            add_value(found, value)
        elif isinstance(value, Dataset):
            add_attributes(found, value)


def add_value(found: Any, value: Any) -> None:
    """Add an array, a text, a number, or a nesting of these to the hash `found`."""
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, Tensor):
        found.update(f"{value.dtype}{list(value.shape)}".encode())
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif isinstance(value, np.ndarray) and value.dtype != object:  # a memory map is read once, in order
        found.update(f"{value.dtype}{list(value.shape)}".encode())
        found.update(np.ascontiguousarray(value))
    elif isinstance(value, list | tuple | np.ndarray):
        found.update(f"[{len(value)}]".encode())
        for part in value:
            add_value(found, part)
    elif isinstance(value, str | int | float | None):
        found.update(f"{value!r},".encode())
