"""The rules of the house: who may import whom, and what a file may be called."""

import json
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from common.ship import filled
from tests.conftest import ROOT

FILES = sorted(ROOT.glob("lesson_*/*.py"))


def test_lessons_import_only_what_comes_before():
    lint = [sys.executable, "-c", "from importlinter.cli import lint_imports_command as main; main()"]
    result = subprocess.run(lint, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_no_file_hides_a_module(path):
    """`python lesson_x/y.py` puts the lesson's folder first on the import path."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert path.stem not in taken or path.stem == "__init__"


@pytest.mark.parametrize("path", sorted(ROOT.glob("lesson_0*/pretrained/*")), ids=lambda path: path.name)
def test_shipped_weights_are_small(path):
    assert path.stat().st_size <= 5_000_000


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *sorted(ROOT.glob("lesson_*/README.md"))], ids=lambda path: path.parent.name
)
def test_tables_agree_with_the_result_files(path):
    if "<!-- results" in path.read_text(encoding="utf-8"):
        assert filled(path) == path.read_text(encoding="utf-8"), "run `python -m common.ship`"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("lesson_*/*.ipynb")), ids=lambda path: f"{path.parent.name}/{path.name}"
)
def test_notebooks_are_stored_as_they_ran(path):
    """With outputs, from top to bottom, and nothing in them that only one machine knows."""
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_500_000
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    printed = json.dumps([output for output in outputs if "image/png" not in output.get("data", {})])
    for unwanted in ("widget", "Warning", "Traceback", str(ROOT), "/home/", "/tmp/", "/Users/"):
        assert unwanted not in printed, f"{unwanted} stands in an output"
