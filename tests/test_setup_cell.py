"""The set-up cell of the notebooks: run twice, after a restart, from elsewhere, next to another installation.

git is the real one and clones a small course of the test; pip is a script that notes how it was called.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted(ROOT.glob("lesson_*/*.ipynb"))
ADDRESS = "https://github.com/diffusion-lessons/diffusion-lessons"
KERNEL = """
import json, os, sys
from importlib.util import find_spec
from IPython.core.interactiveshell import InteractiveShell

editable = [finder for finder in sys.meta_path if "__editable__" in getattr(finder, "__module__", "")]
sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in editable]
sys.path[:] = ["", *(path for path in sys.path if path != {root!r})]
assert {installed} or find_spec("common") is None
shell = InteractiveShell.instance()
for cell in json.loads(sys.stdin.read()):
    shell.run_cell(cell)
spec = find_spec("common")
print("\\n" + json.dumps([os.getcwd(), spec and spec.origin]))
"""
PIP = """#!/bin/sh
echo "$PWD: $@" >> "$PIP_LOG"
test ! -e "$PIP_LOG.broken"
"""
pytestmark = pytest.mark.skipif(
    sys.platform == "win32" or not shutil.which("git"), reason="needs git and a POSIX shell"
)


def setup_cell(path):
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "".join(next(cell for cell in cells if cell["cell_type"] == "code")["source"])


CELL = setup_cell(ROOT / "lesson_02_improved_ddpm" / "improved_ddpm.ipynb")
LESSON = "lesson_02_improved_ddpm"


def git(*args):
    identity = ["-c", "user.name=x", "-c", "user.email=x", "-c", "init.defaultBranch=main"]
    subprocess.run(["git", *identity, *args], check=True, capture_output=True)


def make_course(folder):
    """Write the skeleton of the course."""
    for name in ("common", LESSON):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").touch()
    return folder


class Machine:
    """A machine with git and pip, a home folder and a folder /content, where Colab's kernels start."""

    def __init__(self, folder: Path):
        course = make_course(folder / "course")
        git("init", "-q", str(course))
        git("-C", str(course), "add", ".")
        git("-C", str(course), "commit", "-q", "-m", "x")
        self.home, self.content, self.log = folder / "home of me", folder / "content", folder / "pip.log"
        bin_folder = folder / "bin"
        for new in (self.home, self.content, bin_folder):
            new.mkdir()
        (bin_folder / "pip").write_text(PIP)
        (bin_folder / "pip").chmod(0o755)
        self.clone = self.home / "diffusion-lessons"
        self.environment = os.environ | {
            "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(self.home),
            "PIP_LOG": str(self.log),
            "IPYTHONDIR": str(folder / "ipython"),
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.{course.as_uri()}.insteadOf",
            "GIT_CONFIG_VALUE_0": ADDRESS,
        }

    def run(self, times=1, cwd=None, installed=None, cell=CELL):
        """Run the cell in a new kernel; return its working directory, its `common`, and what it printed."""
        path = {"PYTHONPATH": str(installed)} if installed else {}
        kernel = KERNEL.format(root=str(ROOT), installed=bool(installed))
        done = subprocess.run(
            [sys.executable, "-c", kernel],
            cwd=cwd or self.content,
            env={k: v for k, v in self.environment.items() if k != "PYTHONPATH"} | path,
            input=json.dumps([cell] * times),
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        printed, _, last = done.stdout.rstrip().rpartition("\n")
        where, common = json.loads(last)
        return where, common and str(Path(common).parent.parent), printed.strip() + done.stderr

    def pip_calls(self):
        return self.log.read_text().splitlines() if self.log.exists() else []


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path.resolve())


def test_all_notebooks_have_the_same_cell():
    for path in NOTEBOOKS:
        assert setup_cell(path).replace(path.parent.name, LESSON) == CELL, path


@pytest.mark.parametrize("times", [1, 2])
def test_the_first_kernel_clones_and_installs_once(times, machine):
    expected = (str(machine.clone / LESSON), str(machine.clone), "")
    assert machine.run(times) == expected
    assert len(machine.pip_calls()) == 1 and f"-e {machine.clone}[dev]" in machine.pip_calls()[0]
    assert not list(machine.clone.rglob("diffusion-lessons")) and not list(machine.content.iterdir())


@pytest.mark.parametrize("start", ["content", "content/drive", "home of me/diffusion-lessons"])
def test_after_a_restart_the_clone_is_found_again(start, machine, tmp_path):
    machine.run()
    (tmp_path / start).mkdir(exist_ok=True)
    expected = (str(machine.clone / LESSON), str(machine.clone), "")
    assert machine.run(2, tmp_path / start, installed=machine.clone) == expected
    assert len(machine.pip_calls()) == 1


def test_a_new_environment_installs_the_clone_that_is_there(machine):
    machine.run()
    assert machine.run(2) == (str(machine.clone / LESSON), str(machine.clone), "")
    assert len(machine.pip_calls()) == 2


def test_a_failed_installation_says_so_and_is_repeated(machine, tmp_path):
    broken = Path(f"{machine.log}.broken")
    broken.touch()
    assert "run this cell again" in machine.run(2)[2]
    assert len(machine.pip_calls()) == 2
    broken.unlink()
    assert machine.run() == (str(machine.clone / LESSON), str(machine.clone), "")


def test_an_installed_course_is_left_alone(machine, tmp_path):
    course = make_course(tmp_path.resolve() / "installed")
    for cwd in (course / LESSON, machine.content):
        assert machine.run(2, cwd, installed=course) == (str(cwd), str(course), "")
    assert not machine.pip_calls() and not machine.clone.exists()


def test_a_clone_that_is_not_installed_is_installed_where_it_is(machine, tmp_path):
    course = make_course(tmp_path.resolve() / "by hand")
    assert machine.run(2, course / LESSON) == (str(course / LESSON), str(course), "")
    assert machine.pip_calls() == [f"{course / LESSON}: install -q -e ..[dev]"]
    assert not machine.clone.exists()


def test_a_notebook_of_a_second_clone_runs_the_second_clone(machine, tmp_path):
    first, second = (make_course(tmp_path.resolve() / name) for name in ("first", "second"))
    assert machine.run(1, second / LESSON, installed=first) == (str(second / LESSON), str(second), "")
    assert not machine.pip_calls()
