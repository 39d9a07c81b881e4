"""The rules of the house: who may import whom, and what a file may be called."""

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
