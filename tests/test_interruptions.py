"""What a training run survives: other runs, signals, full disks, file systems without locks."""

import errno
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from common.errors import UserError
from common.files import lock_file, make_new_folder
from common.training.checkpoints import load_training_state
from common.training.config import TrainConfig
from common.training.metrics_csv import read_metrics
from common.training.run_dir import RunDir
from common.training.stop_signals import StopSignals
from tests import line_run
from tests.line_run import ENV, SCRIPT, error_of, run_line, steps_of

resource = pytest.importorskip("resource", reason="Windows has neither these signals nor these locks")


# -- folders -------------------------------------------------------------------------------------------------


def test_runs_that_start_in_the_same_second_have_folders_of_their_own(place, monkeypatch):
    class Clock:
        @staticmethod
        def now():
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr("common.training.run_dir.datetime", Clock)
    runs = [RunDir("lesson_test", TrainConfig(device="cpu", seed=seed), "line") for seed in range(3)]
    names = [run.folder.name for run in runs]
    assert names == ["2026-01-02_03-04-05", "2026-01-02_03-04-05_2", "2026-01-02_03-04-05_3"]


def test_processes_that_ask_at_once_never_get_the_same_folder(place):
    code = "from pathlib import Path; from common.files import make_new_folder\n"
    code += "for _ in range(40): print(make_new_folder(Path('runs/now'), '--out'))"
    command = [sys.executable, "-c", code]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(command, cwd=place, env=ENV, **pipe) for _ in range(4)]
    names = [name for process in processes for name in process.communicate()[0].split()]
    assert len(names) == len(set(names)) == 160 == len(list((place / "runs").iterdir()))
    (place / "file").write_text("")
    with pytest.raises(UserError, match=r"--out file cannot be created or written"):
        make_new_folder(Path("file/run"), "--out")


def hold(path):
    """Lock a file in another process until that is killed."""
    code = f"import fcntl, time; f = open({str(path)!r}, 'w'); fcntl.lockf(f, fcntl.LOCK_EX)\n"
    process = subprocess.Popen(
        [sys.executable, "-c", f"{code}print(1, flush=True); time.sleep(999)"], stdout=-1
    )
    process.stdout.readline()
    return process


@pytest.mark.parametrize("flag", ["--out", "--resume"])
def test_a_run_that_is_alive_is_left_alone(place, capsys, flag):
    run_line("--steps", 4, "--out", "run")
    if flag == "--out":  # it has no checkpoint yet
        for file in (place / "run" / "checkpoints").iterdir():
            file.unlink()
    other = hold(place / "run" / "lock")
    metrics = (place / "run" / "metrics.csv").read_text()
    try:
        line = error_of(capsys, flag, "run", "--steps", 6)
    finally:
        other.kill()
        other.wait()
    assert line.startswith(f"error: {flag} run: another process is training in this folder")
    assert (place / "run" / "metrics.csv").read_text() == metrics
    run_line(flag, "run", "--steps", 6)
    assert steps_of(place / "run") == [1, 2, 3, 4, 5, 6]


# -- signals -------------------------------------------------------------------------------------------------


def send(monkeypatch, number, step):
    """Send this process a signal in a step."""
    calls = []

    def squared(network, x, y):
        calls.append(1)
        if len(calls) == step:
            signal.raise_signal(number)
        return (network(x) - y).square().mean(1)

    monkeypatch.setattr(line_run, "squared", squared)


def test_a_closed_terminal_stops_like_sigterm(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["my scripts/train.py", "--steps", "99"])
    send(monkeypatch, signal.SIGHUP, 5)
    with pytest.raises(SystemExit) as stop:
        run_line("--steps", 99, "--out", "a run")
    assert stop.value.code == 128 + signal.SIGHUP
    assert load_training_state(place / "a run" / "checkpoints" / "step_0000005.pt")["step"] == 5
    command = re.search("stopped and saved at step 5; to continue: (.*)", capsys.readouterr().out)[1]
    assert command == "python 'my scripts/train.py' --resume 'a run'"
    run_line(*shlex.split(command)[2:], "--steps", 7)
    assert steps_of(place / "a run") == [1, 2, 3, 4, 5, 6, 7]


def test_under_nohup_a_closed_terminal_stops_nothing(place, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        send(monkeypatch, signal.SIGHUP, 2)
        run_line("--steps", 4, "--out", "run")
        with StopSignals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.caught == signal.SIGTERM
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert steps_of(place / "run") == [1, 2, 3, 4]


@pytest.mark.slow
def test_the_advice_after_a_closed_terminal_goes_on_under_torchrun(place):
    """A terminal sends SIGHUP to the whole group, and torchrun once more to its process."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"]
    flags = ["--device", "cpu", "--steps", "9999", "--checkpoint-every", "9999", "--out", "run"]
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "errors": "replace"}
    first = subprocess.Popen([*torchrun, SCRIPT, *flags], env=ENV, start_new_session=True, **pipe)
    metrics = place / "run" / "metrics.csv"
    while not (metrics.exists() and len(steps_of(place / "run")) > 2) and first.poll() is None:
        time.sleep(0.05)
    os.killpg(first.pid, signal.SIGHUP)
    out, err = first.communicate()
    last = steps_of(place / "run")[-1]
    assert (place / "run" / "checkpoints" / f"step_{last:07}.pt").exists(), err
    command = re.search("stopped and saved at step .*; to continue: (.*)", out)[1]
    assert command == f"torchrun --standalone --nproc-per-node 1 {SCRIPT} --resume run"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        f"{command} --steps {last + 2}",
        shell=True,
        env={**ENV, "PATH": path},
        capture_output=True,
        errors="replace",
    )
    assert done.returncode == 0, done.stderr
    assert steps_of(place / "run")[-1] == last + 2


def test_the_command_of_several_processes(monkeypatch, place):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "4", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data-dir", "my photos"])
    run = RunDir("lesson_test", TrainConfig(device="cpu", out="run"), "line")
    assert run.resume_command == "torchrun --standalone --nproc-per-node 4 train.py --resume run"
    monkeypatch.setenv("WORLD_SIZE", "8")
    run = RunDir("lesson_test", TrainConfig(device="cpu", out="run_2"), "line")
    assert "torchrun --nnodes 2 --nproc-per-node 4 train.py --resume run_2" in run.resume_command


# -- disks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit, file, last",
    [(300, "metrics.csv", 5), (4000, "checkpoints/step_0000010.pt", 5), (20_000, "loss.png", 10)],
)
def test_a_full_disk_is_one_line_and_the_last_checkpoint_is_whole(
    place, monkeypatch, capsys, limit, file, last
):
    """From step 7 on, no file may grow beyond the limit; a training state has 7,000 bytes, a plot 40,000."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    calls = []

    def squared(network, x, y):
        calls.append(1)
        if len(calls) == 7:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, unlimited[1]))
        return (network(x) - y).square().mean(1)

    monkeypatch.setattr(line_run, "squared", squared)
    try:
        line = error_of(capsys, "--steps", 20, "--checkpoint-every", 5, "--out", "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    state = f"run/checkpoints/step_{last:07}.pt"
    assert line.startswith(f"error: run/{file} cannot be written (")
    assert f"the last checkpoint is {state}" in line and "--resume run" in line
    assert load_training_state(state)["step"] == last and not list(place.rglob("*.part*"))
    calls.extend([0] * 9)
    run_line("--resume", "run", "--steps", last + 2)
    assert steps_of(place / "run") == list(range(1, last + 3))


def test_a_row_that_was_cut_off_does_not_count(tmp_path):
    path = tmp_path / "metrics.csv"
    path.write_text("step,minutes,loss\n1,0.5,2.0\n2,0.6,1.0\n3,0.7,1.2e-")
    assert [row["step"] for row in read_metrics(path)] == [1, 2]
    path.write_text("step,minutes,loss\n1,0.5,2.0\n2")
    assert read_metrics(path) == [{"step": 1, "minutes": 0.5, "loss": 2.0}]


def test_weights_whose_state_was_not_written_do_not_stay_the_latest(place):
    run_line("--steps", 4, "--out", "run")
    folder = place / "run" / "checkpoints"
    (folder / "step_0000099.safetensors").write_bytes((folder / "step_0000004.safetensors").read_bytes())
    run_line("--resume", "run", "--steps", 6)
    assert sorted(file.name for file in folder.glob("step_*.safetensors")) == [
        "step_0000004.safetensors",
        "step_0000006.safetensors",
    ]


def test_a_file_system_without_locks_is_used_with_a_warning(place, monkeypatch, capsys):
    def no_locks(file, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.lockf", no_locks)
    run_line("--steps", 2, "--out", "run")
    assert "warning: run/lock cannot be locked (No locks available)" in capsys.readouterr().err
    assert steps_of(place / "run") == [1, 2]


def test_a_lock_is_released_when_its_file_is_closed(place):
    other = hold(place / "lock")
    with pytest.raises(BlockingIOError):
        lock_file(place / "lock", wait=False)
    other.kill()
    other.wait()
    with lock_file(place / "lock", wait=False) as file:
        assert not file.closed
