"""Installing from inside and outside of the repository, and two clones in one environment."""

import os
import shutil
import subprocess
import sys

import pytest

from tests.conftest import ROOT

PIP = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", "--no-build-isolation"]


def install(cwd, requirements):
    """Ask pip what it would install; return the exit code and the last line that it prints."""
    pytest.importorskip("pip")
    command = [*PIP, "--disable-pip-version-check", "-r", str(requirements)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    return done.returncode, (done.stdout + done.stderr).strip().splitlines()[-1]


@pytest.fixture
def clone(tmp_path):
    """A copy of what pip reads."""
    folder = tmp_path / "clone"
    for name in ("common", "lesson_01_ddpm"):
        (folder / name).mkdir(parents=True)
        shutil.copy(ROOT / name / "__init__.py", folder / name)
    for name in ("pyproject.toml", "requirements.txt", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def test_requirements_install_the_repository_from_inside(clone):
    pytest.importorskip("setuptools")
    code, line = install(clone, "requirements.txt")
    assert code == 0 and "diffusion-lessons" in line


@pytest.mark.parametrize("project", [False, True])
def test_requirements_never_install_the_folder_that_pip_is_called_in(project, clone, tmp_path):
    if project:
        (tmp_path / "pyproject.toml").write_text('[project]\nname = "other"\nversion = "1"\n')
    code, line = install(tmp_path, clone / "requirements.txt")
    assert code != 0 and line.startswith("ERROR: ./lesson_01_ddpm/..") and "path to a local project" in line


def run_script(folder, name):
    """Run a script that imports `common`, with this repository installed; return what it prints to stderr."""
    script = folder / name
    script.parent.mkdir(exist_ok=True)
    script.write_text("import common.errors\n")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stderr


def test_a_script_of_a_second_clone_says_which_copy_it_imports(tmp_path):
    second = tmp_path.resolve() / "second"
    for name in ("__init__.py", "protocols.py"):
        (second / "common").mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "common" / name, second / "common")
    error = run_script(second, "lesson_01_ddpm/sample.py")
    assert error.count("\n") == 1
    assert f"imports the course from {ROOT}" in error and f'pip install -e "{second}[dev]"' in error


def test_other_scripts_say_nothing(tmp_path):
    assert run_script(tmp_path, "mine.py") == ""
    own = subprocess.run([sys.executable, "-m", "common.errors"], cwd=ROOT, capture_output=True, check=True)
    assert own.stderr == b""
