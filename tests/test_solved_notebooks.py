"""The notebooks with the folded solutions pasted in: every exercise is correct, and everything runs.

The blank notebooks run as tests of their own (nbmake).
"""

import ast
import re

import nbformat
import pytest
from nbclient import NotebookClient

from common.files import ROOT

NOTEBOOKS = {
    "lesson_01_ddpm/ddpm.ipynb": 10,
    "lesson_02_improved_ddpm/improved_ddpm.ipynb": 10,
    "lesson_03_adm/adm.ipynb": 9,
    "lesson_04_text_conditioning/text_conditioning.ipynb": 10,
    "lesson_05_cfg/cfg.ipynb": 3,
    "lesson_05_cfg/fast_sampling.ipynb": 6,
    "lesson_06_miniglide/miniglide.ipynb": 11,
    "lesson_06_miniglide/upsampling.ipynb": 2,
    "lesson_06_miniglide/editing.ipynb": 5,
    "lesson_06_miniglide/clip_guidance.ipynb": 2,
    "lesson_06_miniglide/flow_matching.ipynb": 3,
}


# Training and sampling whose length no verdict depends on; the blank notebooks run them in full.
SHORTER = {
    "lesson_01_ddpm/ddpm.ipynb": {
        "train(network, 300)": "train(network, 60)",
        "WithoutSkips(UNet(UNET_CONFIG)), 100)": "WithoutSkips(UNet(UNET_CONFIG)), 60)",
    },
    "lesson_02_improved_ddpm/improved_ddpm.ipynb": {"range(1, 301)": "range(1, 61)"},
    "lesson_03_adm/adm.ipynb": {
        "for _ in range(100):": "for _ in range(20):",
        "steps=300,": "steps=40,",
        "num_steps = 250": "num_steps = 25",
    },
    "lesson_04_text_conditioning/text_conditioning.ipynb": {"num_steps=100)": "num_steps=40)"},
    "lesson_06_miniglide/miniglide.ipynb": {"range(1, 161)": "range(1, 41)"},
}


def shorten(notebook, replacements):
    """Make the computations shorter that `SHORTER` names."""
    for old, new in replacements.items():
        (cell,) = (c for c in notebook.cells if c.cell_type == "code" and old in c.source)
        cell.source = cell.source.replace(old, new)


def solution_of(name, cells):
    """Return the first folded solution in these cells that defines a function or class of this name."""
    blocks = [block for cell in cells for block in re.findall(r"```python\n(.*?)```", cell.source, re.S)]
    return next(block for block in blocks if f"def {name}(" in block or f"class {name}(" in block)


def paste_solutions(notebook):
    """Replace the blank functions of all exercises by their solutions; return the names."""
    names = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "code" and " = exercise(" in cell.source:
            (name,) = re.findall(r"^(\w+) = exercise\(", cell.source, re.M)
            blank = next(n for n in ast.parse(cell.source).body if getattr(n, "name", None) == name)
            lines = cell.source.splitlines()
            lines[blank.lineno - 1 : blank.end_lineno] = [solution_of(name, notebook.cells[i + 1 :])]
            cell.source = "\n".join(lines)
            names.append(name)
    return names


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS)
def test_solved_notebooks_run_and_are_correct(path):
    notebook = nbformat.read(ROOT / path, 4)
    shorten(notebook, SHORTER.get(path, {}))
    names = paste_solutions(notebook)
    assert len(names) == NOTEBOOKS[path]
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": (ROOT / path).parent}}).execute()
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    verdicts = [line for o in outputs for line in o.get("text", "").splitlines() if "Exercise" in line]
    assert len(verdicts) == len(names) and all(v.endswith(": correct.") for v in verdicts), verdicts
