"""Where the tests find reference numbers and, if they are there, the real data sets."""

import json
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: a core for each
    os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
GOLDEN = Path(os.environ.get("GOLDEN_DIR", ROOT / "tests" / "golden"))
SHARED_DATA = Path(os.environ.get("LESSONS_DATA", ROOT.parent / "shared" / "data"))


@pytest.fixture(scope="session")
def real_data():
    """The folder that holds MNIST/raw and other real data; tests that need it are skipped without."""
    if not (SHARED_DATA / "MNIST" / "raw").is_dir():
        pytest.skip(f"no real data at {SHARED_DATA}")
    return SHARED_DATA


@pytest.fixture(scope="session")
def gpt2_vocabulary():
    """The folder with GPT-2's encoder.json and vocab.bpe."""
    if not (folder := SHARED_DATA / "gpt2_bpe").is_dir():
        pytest.skip(f"no vocabulary at {folder}")
    return folder


def golden_json(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_arrays(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}
