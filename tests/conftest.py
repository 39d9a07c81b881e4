"""Run-time checks of types and shapes; where tests find reference outputs and the real data sets."""

import json
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time: a core for each
    os.environ["OMP_NUM_THREADS"] = "1"

import jaxtyping
import numpy as np
import pytest
import torch
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook looks it up by name)

ROOT = Path(__file__).parent.parent
PACKAGES = ["common", *sorted(path.parent.name for path in ROOT.glob("lesson_*/__init__.py"))]
# Check types and tensor shapes of every annotated function at run time, in all tests.
install_import_hook(PACKAGES, "tests.typecheck.typecheck")

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


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Make an empty folder the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def no_type_checks():
    """Switch the run-time checks off: torch.compile cannot trace through them."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def golden_json(name):
    return json.loads((GOLDEN / f"{name}.json").read_text())


def golden_arrays(name):
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}
