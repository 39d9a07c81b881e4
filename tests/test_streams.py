"""What a training run survives besides: closed pipes, narrow encodings, a broken TensorBoard."""

import io
import os
import subprocess
import sys
import types

import pytest

from common.files import write_text
from tests.line_run import ENV, SCRIPT, run_line, steps_of

# -- streams -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("kind", ["closed pipe", "full disk"])
def test_a_run_does_not_need_its_reader(place, monkeypatch, name, kind):
    if kind == "full disk" and not os.path.exists("/dev/full"):
        pytest.skip("only Linux has /dev/full")
    reader, writer = os.pipe()
    os.close(reader)
    stream = open(writer, "w") if kind == "closed pipe" else open("/dev/full", "w")  # noqa: SIM115
    monkeypatch.setattr(sys, name, stream)
    run_line("--steps", 4, "--out", "run")
    assert steps_of(place / "run") == [1, 2, 3, 4] and getattr(sys, name) is stream
    stream.close()  # raises if something is left to write


@pytest.mark.slow
def test_a_run_whose_output_is_cut_off_ends_well(place):
    command = f"{sys.executable} {SCRIPT} --device cpu --steps 4 --out run 2>&1 | head -n 0"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], env=ENV, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert steps_of(place / "run") == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "encoding, shown",
    [("ascii", r"\u4e00\u53ea\u72d7"), ("cp1252", r"\u4e00\u53ea\u72d7"), ("utf-8", "一只狗")],
)
def test_what_a_stream_cannot_encode_is_escaped(place, monkeypatch, encoding, shown):
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    run_line("--dry-run")
    printed = streams["stdout"].buffer.getvalue().decode(encoding)
    assert f"a caption: {shown} \\udce9\n" in printed
    assert "step 2" in streams["stderr"].buffer.getvalue().decode(encoding)  # the progress bar


def test_a_name_that_is_not_utf_8_can_be_written(tmp_path):
    name = os.fsdecode(b"caf\xe9.png")
    write_text(tmp_path / "list.txt", f"{name} 狗")
    assert (tmp_path / "list.txt").read_text(encoding="utf-8") == r"caf\udce9.png 狗"


# -- TensorBoard ---------------------------------------------------------------------------------------------


class BrokenWriter:
    def __init__(self, folder):
        pass

    def add_scalar(self, *args):
        raise OSError("the event file is gone")


def not_at_all(folder):
    raise TypeError("Descriptors cannot be created directly.\nIf this call came from a _pb2.py file")


@pytest.mark.parametrize(
    "writer, reason", [(not_at_all, "Descriptors cannot"), (BrokenWriter, "file is gone")]
)
def test_a_broken_tensorboard_is_a_warning(place, monkeypatch, capsys, writer, reason):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    run_line("--steps", 3, "--out", "run")
    lines = [line for line in capsys.readouterr().err.splitlines() if "TensorBoard" in line]
    assert len(lines) == 1 and lines[0].startswith("warning: ") and reason in lines[0]
    assert steps_of(place / "run") == [1, 2, 3]


def test_a_missing_tensorboard_is_no_warning(place, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    run_line("--steps", 1, "--out", "run")
    assert "TensorBoard" not in capsys.readouterr().err
