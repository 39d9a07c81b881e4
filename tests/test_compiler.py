"""--compile without a compiler: one line, before anything is written."""

import os
import subprocess
import sys

import pytest

from common import device
from common.cli import run_command
from common.errors import UserError
from lesson_06_miniglide import train
from lesson_06_miniglide.benchmarks import speed
from tests.conftest import ROOT

CHECK = """
from common.device import check_compiler
from common.errors import UserError
try:
    check_compiler("cpu")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_missing_compiler_is_named_in_one_line(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "no-such-compiler" in done.stdout
    assert "apt-get install g++" in done.stdout and "leave out --compile" in done.stdout


def test_whatever_the_compiler_says_becomes_one_line(monkeypatch):
    class Failure(Exception):
        inner_exception = RuntimeError("two\nlines " + 1000 * "x")

    def fail(x):
        raise Failure("advice for debugging")

    monkeypatch.setattr(device.torch, "compile", lambda function: fail)
    with pytest.raises(UserError, match=r"RuntimeError: two lines x.*leave out --compile") as caught:
        device.check_compiler("cpu")
    assert (
        "\n" not in str(caught.value) and "advice" not in str(caught.value) and len(str(caught.value)) < 500
    )


@pytest.mark.parametrize("module, flags", [(train, ["--data-dir", "missing"]), (speed, ["lesson_03"])])
def test_commands_check_the_compiler_first(module, flags, monkeypatch, capsys, tmp_path):
    def no_compiler(name):
        raise UserError(f"no compiler for {name}")

    monkeypatch.setattr(module, "check_compiler", no_compiler)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_command(module.main, module.Config, argv=[*flags, "--compile", "--device", "cpu"])
    assert capsys.readouterr().err == "error: no compiler for cpu\n"
    assert not list(tmp_path.iterdir())
