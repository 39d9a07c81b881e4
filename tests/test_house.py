"""Rules of the repository: who may import whom, how large files may be, and that documents are up to date."""

import json
import re
import subprocess
import sys
from importlib.metadata import packages_distributions

import pytest

from common.results.report import documents, render_readme
from tests.conftest import ROOT

LESSONS = sorted(path.parent.name for path in ROOT.glob("lesson_*/__init__.py"))
MODULES = sorted(path for folder in ("common", *LESSONS) for path in (ROOT / folder).rglob("*.py"))
NOTEBOOKS = sorted(ROOT.glob("lesson_*/*.ipynb"))
WEIGHTS = sorted(ROOT.glob("lesson_*/pretrained/*"))
MAX_LINES = 250  # of a module
MAX_MODULES = 13  # of a folder, __init__.py not counted
README_LINES = {"": 120, "lesson_06_miniglide": 100}  # all other lessons: 80
CONTRACT = """\
[importlinter]
root_packages = {packages}
[importlinter:contract:layers]
name = a lesson imports common and earlier lessons only
type = layers
layers = {layers}
"""


def relative(path):
    return path.relative_to(ROOT).as_posix()


def lint_imports(folder, lessons):
    """Check that each lesson imports only `common` and earlier ones; return the finished process."""
    packages = ["common", *lessons]
    layers = {"packages": packages, "layers": packages[::-1]}
    listed = {name: "".join(f"\n    {package}" for package in given) for name, given in layers.items()}
    config = folder / "importlinter.ini"
    config.write_text(CONTRACT.format(**listed))
    lint = "from importlinter.cli import lint_imports_command as main; main()"
    command = [sys.executable, "-c", lint, "--config", str(config), "--no-cache"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_lessons_import_only_what_comes_before(tmp_path):
    result = lint_imports(tmp_path, LESSONS)
    assert result.returncode == 0, result.stdout + result.stderr


def test_the_import_contract_notices_a_later_lesson(tmp_path):
    result = lint_imports(tmp_path, LESSONS[::-1])
    assert result.returncode == 1 and f"{LESSONS[1]}.model" in result.stdout


@pytest.mark.parametrize("path", sorted(ROOT.glob("lesson_*/*.py")), ids=relative)
def test_no_file_hides_a_module(path):
    """`python lesson_x/y.py` puts the lesson's folder first on the import path."""
    taken = set(sys.stdlib_module_names) | set(packages_distributions())
    assert path.stem not in taken or path.stem == "__init__"


@pytest.mark.parametrize("path", MODULES, ids=relative)
def test_modules_are_short(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= MAX_LINES


@pytest.mark.parametrize("folder", sorted({path.parent for path in MODULES}), ids=relative)
def test_folders_are_small(folder):
    modules = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    assert len(modules) <= MAX_MODULES, modules


@pytest.mark.parametrize("path", WEIGHTS, ids=relative)
def test_pretrained_weights_are_small(path):
    assert path.stat().st_size <= 5_000_000


@pytest.mark.parametrize(
    "path", [ROOT / "README.md", *(ROOT / lesson / "README.md" for lesson in LESSONS)], ids=relative
)
def test_readmes_fit_on_a_screen(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= README_LINES.get(path.parent.relative_to(ROOT).as_posix().strip("."), 80)


@pytest.mark.parametrize("path", documents(), ids=relative)
def test_tables_agree_with_the_result_files(path):
    assert render_readme(path) == path.read_text(encoding="utf-8"), "run `python -m common.results.publish`"


@pytest.mark.parametrize("path", [*documents(), ROOT / "CONTRIBUTING.md"], ids=relative)
def test_links_lead_to_files(path):
    links = re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text(encoding="utf-8"))
    assert not [link for link in links if not (path.parent / link).exists()]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=relative)
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


def test_notebooks_clone_the_address_of_the_package():
    metadata = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (address,) = re.findall(r'^Repository = "(.*)"', metadata, re.M)
    for path in NOTEBOOKS:
        if path.stem != "solutions":
            assert re.findall(r"git clone -q ([^\s\\]+)", path.read_text(encoding="utf-8")) == [address]
