"""The training loop: resuming, signals, callbacks, learning-rate multipliers, averaging, files."""

import copy
import csv
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

from common import device as machine
from common.errors import UserError
from common.files import read_json, write_atomically
from common.training.checkpoints import find_training_state, load_weights
from common.training.config import TrainConfig
from common.training.metrics_csv import read_metrics
from common.training.optim import EMA, OPTIMIZERS, learning_rate_factor, parameter_groups
from common.training.run_dir import Recorder, RunDir, saved_config
from common.training.stop_signals import StopSignals
from common.training.train import train
from common.training.trainer import Callback, Trainer
from tests.conftest import ROOT


class Line:
    """Points on a line with noise."""

    name = "line"

    def __len__(self):
        return 64

    def batch(self, indices):
        x = indices[:, None] / 64
        return x, 3 * x + 0.1 * torch.randn_like(x)


def squared(network, x, y):
    return (network(x) - y).square().mean(1)


def line_network():
    return nn.Sequential(nn.Linear(1, 16), nn.Dropout(0.2), nn.Linear(16, 16), nn.Linear(16, 1))


def run_line(tmp_path, loss=squared, **settings):
    config = TrainConfig(**{"out": str(tmp_path / "run"), "device": "cpu", "batch_size": 8, **settings})
    run = RunDir("lesson_test", config, "line")
    torch.manual_seed(config.seed)
    validation = Line().batch(torch.arange(8))
    return run, train(line_network(), loss, Line(), config, run=run, validation=validation)


def final_state(folder):
    files = sorted((folder / "checkpoints").glob("step_*.pt"))
    return torch.load(files[-1], weights_only=True)


def assert_same(a, b):
    """Equal bit for bit, through all nesting, except for the time."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            if key != "minutes":
                assert_same(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if torch.is_tensor(a) else a == b


# -- resuming ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, optimizer):
    settings = {"steps": 40, "checkpoint_every": 20, "optimizer": optimizer}
    run_line(tmp_path / "whole", **settings)

    def stop_at_20(network, x, y):
        if run_line.steps == 27:
            raise RuntimeError("power cut")
        run_line.steps += 1
        return squared(network, x, y)

    run_line.steps = 0
    with pytest.raises(RuntimeError):
        run_line(tmp_path / "cut", stop_at_20, **settings)
    cut = tmp_path / "cut" / "run"
    resumed = saved_config(str(cut), TrainConfig)
    assert resumed.steps == 40 and resumed.resume is None
    run_line(tmp_path / "cut", **settings, resume=str(cut), out=None)
    assert_same(final_state(tmp_path / "whole" / "run"), final_state(cut))
    steps = [row["step"] for row in read_metrics(cut / "metrics.csv")]
    assert steps == list(range(1, 41))  # no row twice, none missing


def test_optimizer_state_gets_the_memory_format_of_the_weights():
    """A run with channels last continues from a state without, and takes the same step."""

    class Images(Line):
        def batch(self, indices):
            return torch.randn(len(indices), 2, 5, 5), torch.randn(len(indices), 1)

    def trainer(memory_format):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten(), nn.Linear(27, 1))
        network = network.to(memory_format=memory_format)
        return Trainer(network, squared, Images(), TrainConfig(device="cpu"))

    first, last = trainer(torch.contiguous_format), trainer(torch.channels_last)
    first.train_step(0)
    last.restore(copy.deepcopy(first.state()))
    for one in (first, last):
        one.train_step(0)
    for a, b in zip(first.network.parameters(), last.network.parameters()):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
    for weight, state in last.optimizer.state.items():
        assert state["exp_avg"].stride() == weight.stride()


def test_a_run_resumed_from_an_older_checkpoint_replaces_the_later_ones(tmp_path):
    """Stopped again before the step that it had reached, it continues from where it was stopped."""
    run, _ = run_line(tmp_path, steps=40, checkpoint_every=20)
    older = run.folder / "checkpoints" / "step_0000020.pt"

    def stopped(network, x, y):
        if run_line.steps == 25:
            signal.raise_signal(signal.SIGINT)
        run_line.steps += torch.is_grad_enabled()
        return squared(network, x, y)

    run_line.steps = 20
    with pytest.raises(SystemExit):
        run_line(tmp_path, stopped, steps=40, checkpoint_every=20, resume=str(older), out=None)
    assert find_training_state(str(run.folder)).name == "step_0000026.pt"
    assert [row["step"] for row in read_metrics(run.folder / "metrics.csv")][-1] == 26


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    run, _ = run_line(tmp_path, steps=2)
    with pytest.raises(UserError, match=r"--resume .*: --optimizer was adamw and cannot change"):
        run_line(tmp_path, steps=4, resume=str(run.folder), out=None, optimizer="muon")
    state = final_state(run.folder)
    state["optimizer"]["param_groups"][0]["params"].pop()
    with pytest.raises(UserError, match=r"--resume: the saved state does not fit these settings \(.*param"):
        trainer_of_line(steps=4, state=state)


def test_a_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        run_line(tmp_path, steps=1)
    (tmp_path / "run" / "thesis.txt").unlink()
    run_line(tmp_path, steps=1)
    with pytest.raises(UserError, match="already holds a run"):
        run_line(tmp_path, steps=1)


SCRIPT = f"""
import runpy, common.digits.mnist, common.training.config
common.digits.mnist.NUM_SYNTHETIC = 3000
common.training.config.TrainConfig.dry_run_cap = lambda config, n: min(n, 2)  # samples, as in a dry run
runpy.run_path("{ROOT}/lesson_01_ddpm/train_mnist.py", run_name="__main__")
"""
SMALL = ["--dataset", "synthetic", "--batch-size", "4", "--num-eval", "2", "--sample-steps", "2"]
SMALL += ["--eval-steps", "2", "--device", "cpu"]


def test_kill_9_and_resume_bit_for_bit(tmp_path):
    """The real script: 8 steps at once, against 8 steps with SIGKILL after the checkpoint of step 4."""

    def start(*flags):
        command = [sys.executable, "-c", SCRIPT, *flags]
        return subprocess.Popen(
            command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    new = [*SMALL, "--steps", "8", "--checkpoint-every", "4"]
    whole, cut = start(*new, "--out", "whole"), start(*new, "--out", "cut")
    checkpoint = tmp_path / "cut" / "checkpoints" / "step_0000004.pt"
    while not checkpoint.exists() and cut.poll() is None:
        time.sleep(0.005)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    _, err = whole.communicate()
    assert whole.returncode == 0, err
    assert not (tmp_path / "cut" / "checkpoints" / "step_0000008.pt").exists(), (
        "killed too late to show anything"
    )
    resumed = start("--resume", "cut")
    out, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert out.count("run: cut") == 2  # first and last
    assert_same(final_state(tmp_path / "whole"), final_state(tmp_path / "cut"))


# -- signals and errors --------------------------------------------------------------------------------------


def test_sigterm_saves_and_tells_how_to_continue(tmp_path, capsys):
    def terminated(network, x, y):
        os.kill(os.getpid(), signal.SIGTERM)  # and once more at the validation: a duplicate
        return squared(network, x, y)

    with pytest.raises(SystemExit) as stop:
        run_line(tmp_path, terminated, steps=100)
    assert stop.value.code == 128 + signal.SIGTERM
    assert final_state(tmp_path / "run")["step"] == 1
    assert f"--resume {tmp_path / 'run'}" in capsys.readouterr().out
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_ctrl_c_ends_at_once(monkeypatch):
    monkeypatch.setattr(StopSignals, "DUPLICATE_WINDOW_S", 0)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # pytest-xdist ignores the signal
    try:
        with pytest.raises(KeyboardInterrupt), StopSignals() as signals:
            signal.raise_signal(signal.SIGINT)
            assert signals.caught == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_loss_of_nan_stops_and_names_step_and_checkpoint(tmp_path):
    calls = []

    def breaks(network, x, y):
        calls.append(1)
        return squared(network, x, y) * (float("nan") if len(calls) == 9 else 1)

    with pytest.raises(UserError, match=r"step 7: the loss is nan.*step_0000006\.pt"):
        run_line(tmp_path, breaks, steps=20, checkpoint_every=3)
    assert all(p.isfinite().all() for p in final_state(tmp_path / "run")["network"].values())


# -- callbacks -----------------------------------------------------------------------------------------------


class Events(Callback):
    """Records what it is called with."""

    def __init__(self):
        self.seen = []

    def on_start(self, trainer):
        self.seen.append(("start", trainer.step))

    def on_log(self, trainer, row):
        self.seen.append(("log", row["step"]))
        self.columns = set(row)

    def on_checkpoint(self, trainer, row, stopping):
        self.seen.append(("checkpoint", row["step"], stopping, math.isfinite(row["validation_loss"])))

    def on_stop(self, trainer):
        self.seen.append(("stop", trainer.step))


def trainer_of_line(loss=squared, validation=None, state=None, callbacks=(), lr_scales=None, **settings):
    config = TrainConfig(device="cpu", batch_size=8, **settings)
    torch.manual_seed(0)
    return Trainer(
        line_network(),
        loss,
        Line(),
        config,
        validation=validation,
        state=state,
        callbacks=callbacks,
        lr_scales=lr_scales,
        quiet=True,
    )


def test_a_callback_sees_every_step_and_the_checkpoints_that_are_due():
    events, others = Events(), Events()
    validation = Line().batch(torch.arange(8))
    trainer = trainer_of_line(steps=5, checkpoint_every=2, validation=validation, callbacks=[events, others])
    trainer.fit()
    assert events.seen == others.seen
    assert events.seen == [
        ("start", 0),
        ("log", 1),
        ("log", 2),
        ("checkpoint", 2, False, True),
        ("log", 3),
        ("log", 4),
        ("checkpoint", 4, False, True),
        ("log", 5),
        ("checkpoint", 5, False, True),
    ]
    # The row of a checkpoint, which step 5 is, has its validation loss.
    columns = {"step", "minutes", "loss", "grad_norm", "learning_rate", "images_per_second"}
    assert events.columns == columns | {"validation_loss"}
    later = Events()
    trainer_of_line(steps=6, state=trainer.state(), callbacks=[later]).fit()
    assert later.seen == [("start", 5), ("log", 6), ("checkpoint", 6, False, False)]  # no validation data


def test_a_callback_is_told_that_a_signal_stops_the_run():
    def interrupted(network, x, y):
        if trainer.step == 2:
            signal.raise_signal(signal.SIGINT)
        return squared(network, x, y)

    events = Events()
    trainer = trainer_of_line(interrupted, steps=100, checkpoint_every=2, callbacks=[events])
    with pytest.raises(SystemExit) as stop:
        trainer.fit()
    assert stop.value.code == 128 + signal.SIGINT
    assert events.seen[-4:] == [
        ("checkpoint", 2, False, False),
        ("log", 3),
        ("checkpoint", 3, True, False),
        ("stop", 3),
    ]


def test_a_signal_without_callbacks_is_a_keyboard_interrupt():
    def interrupted(network, x, y):
        signal.raise_signal(signal.SIGINT)
        return squared(network, x, y)

    with pytest.raises(KeyboardInterrupt):
        trainer_of_line(interrupted, steps=100).fit()


@pytest.mark.parametrize("preview_every, steps", [(None, [4, 8, 9]), (3, [3, 6, 9])])
def test_previews_at_checkpoints_or_every_so_many_steps(tmp_path, preview_every, steps):
    shown = []

    def preview(network):
        shown.append(network)
        return Figure()

    config = TrainConfig(out=str(tmp_path / "run"), device="cpu", batch_size=8, steps=9, checkpoint_every=4)
    recorder = Recorder(RunDir("lesson_test", config, "line"), {}, preview, preview_every)
    trainer = Trainer(line_network(), squared, Line(), config, callbacks=[recorder], quiet=True)
    trainer.fit()
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == [f"step_{step:07d}.png" for step in steps]
    assert all(network is trainer.ema.network for network in shown)


def test_the_first_preview_comes_after_a_minute(tmp_path, capsys):
    class SlowTrainer(Trainer):
        def sync_across_ranks(self, minutes, caught):
            return 0.4 * self.step, caught

    config = TrainConfig(out=str(tmp_path / "run"), device="cpu", batch_size=8, steps=9)
    recorder = Recorder(RunDir("lesson_test", config, "line"), {}, lambda network: Figure())
    SlowTrainer(line_network(), squared, Line(), config, callbacks=[recorder], quiet=True).fit()
    names = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
    assert names == ["step_0000003.png", "step_0000009.png"]  # at 1.2 minutes, and at the end
    assert capsys.readouterr().out.count("first samples: ") == 1


def test_a_run_that_is_stopped_does_not_wait_for_a_preview(tmp_path):
    def interrupted(network, x, y):
        signal.raise_signal(signal.SIGINT)
        return squared(network, x, y)

    config = TrainConfig(out=str(tmp_path / "run"), device="cpu", batch_size=8, steps=9)
    recorder = Recorder(RunDir("lesson_test", config, "line"), {}, lambda network: Figure())
    with pytest.raises(SystemExit):
        Trainer(line_network(), interrupted, Line(), config, callbacks=[recorder], quiet=True).fit()
    assert (tmp_path / "run" / "checkpoints" / "step_0000001.pt").exists()
    assert list((tmp_path / "run" / "samples").iterdir()) == []


# -- learning rates and averages -----------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [0.25, 1.0, 3.0])
def test_lr_scales_multiply_the_rate_of_exactly_the_named_parameters(scale):
    """Without weight decay, AdamW's first step has the length of the learning rate in every coordinate."""
    trainer = trainer_of_line(lr_scales={"2.": scale}, steps=10, learning_rate=1e-3)
    for group in trainer.optimizer.param_groups:
        group["weight_decay"] = 0.0
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.train_step(0.0)
    rate = 1e-3 * learning_rate_factor(0, 0.0)
    for name, parameter in trainer.network.named_parameters():
        step = (parameter.detach() - before[name]).abs().max().item()
        assert step == pytest.approx(rate * (scale if name.startswith("2.") else 1), rel=2e-2), name


def test_every_parameter_is_in_one_group():
    network = line_network()
    groups = parameter_groups(network, {"0.": 0.5, "2.bias": 0.5, "3.": 2.0})
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(list(network.parameters())) == len(scales)
    assert {name: scales[id(p)] for name, p in network.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.5,
        "2.weight": 1.0,
        "2.bias": 0.5,
        "3.weight": 2.0,
        "3.bias": 2.0,
    }


def test_a_prefix_that_no_parameter_has_is_an_error():
    with pytest.raises(ValueError, match=r"no parameter's name starts with 'text_encoder\.'"):
        parameter_groups(line_network(), {"text_encoder.": 0.03})
    with pytest.raises(ValueError, match=r"no parameter's name starts with 'text_encoder\.'"):
        train(line_network(), squared, Line(), TrainConfig(device="cpu"), lr_scales={"text_encoder.": 0.03})


def test_ema_starts_as_a_plain_average_and_ends_at_its_decay():
    network = nn.Linear(1, 1, bias=False)
    ema = EMA(network, decay=0.9)
    average = network.weight.item()
    for step, value in enumerate([5.0, -1.0, 2.0, 8.0] * 50):
        nn.init.constant_(network.weight, value)
        ema.update(network, step)
        decay = min(0.9, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * value
    assert ema.network.weight.item() == pytest.approx(average, rel=1e-4)


# -- files ---------------------------------------------------------------------------------------------------


def test_the_latest_two_and_the_best_are_kept(tmp_path):
    run, _ = run_line(tmp_path, steps=25, checkpoint_every=5)
    names = sorted(path.name for path in (run.folder / "checkpoints").iterdir())
    latest = [f"step_00000{n}.{kind}" for n in (20, 25) for kind in ("pt", "safetensors")]
    assert names == ["best.safetensors", *latest]
    measured = {
        r["step"]: r["validation_loss"]
        for r in read_metrics(run.folder / "metrics.csv")
        if "validation_loss" in r
    }
    _, metadata = load_weights(run.folder / "checkpoints" / "best.safetensors", "lesson_test")
    assert metadata["validation_loss"] == pytest.approx(min(measured.values()), rel=1e-4)
    assert metadata["step"] == min(measured, key=measured.get)
    assert (run.folder / "loss.png").stat().st_size > 1000
    assert read_json(run.folder / "config.json")["data"] == "line"


def test_metrics_record_the_learning_rate_of_each_step(tmp_path):
    run, _ = run_line(tmp_path, steps=30, learning_rate=0.5)
    with open(run.folder / "metrics.csv", newline="") as file:
        rates = [float(row["learning_rate"]) for row in csv.DictReader(file)]
    expected = [0.5 * learning_rate_factor(step, step / 30) for step in range(30)]
    assert rates == pytest.approx(expected, rel=1e-4)


def test_short_runs_reach_their_learning_rate_and_long_ones_warm_up_for_100_steps():
    """Without a warm-up there is the cosine, which ends at 0; after 5 % of the budget it is at 0.994."""

    def cosine(progress):
        return 0.5 + 0.5 * math.cos(math.pi * progress)

    for steps in (40, 100, 1000):
        factors = [learning_rate_factor(step, step / steps) for step in range(steps)]
        assert max(factors) == cosine(0.05) and max(factors) > 0.99
        assert factors[steps // 20 :] == [cosine(step / steps) for step in range(steps // 20, steps)]
        assert factors[: steps // 20] == sorted(factors[: steps // 20]) and factors[0] == 0.01
    for steps in (2000, 2001, 4000, 30_000):
        expected = [min(1, (step + 1) / 100) * cosine(step / steps) for step in range(2000)]
        assert [learning_rate_factor(step, step / steps) for step in range(2000)] == expected


def test_time_limit_ends_the_run_and_the_decay_follows_the_time(tmp_path):
    run, _ = run_line(tmp_path, time_limit=0.02, learning_rate=7e-4, checkpoint_every=10_000)
    rows = read_metrics(run.folder / "metrics.csv")
    assert rows[-1]["minutes"] >= 0.02 > rows[-2]["minutes"]
    before, row = rows[len(rows) // 2 - 1 : len(rows) // 2 + 1]
    factor = learning_rate_factor(row["step"] - 1, before["minutes"] / 0.02)
    assert row["learning_rate"] == pytest.approx(7e-4 * factor, rel=1e-3)


def test_budget_is_whichever_comes_first():
    config = TrainConfig(steps=100, time_limit=2.0)
    assert (
        config.progress(50, 0.2) == 0.5 and config.progress(50, 1.5) == 0.75 and config.progress(500, 0) == 1
    )
    default = TrainConfig()
    assert default.progress(default.default_steps, 0) == 1 == default.progress(0, default.default_minutes)
    assert TrainConfig(steps=10**6, dry_run=True).progress(2, 0) == 1


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def half(part):
        part.write_text("ne")
        raise OSError("disk full")

    with pytest.raises(UserError, match="disk full"):
        write_atomically(path, half)
    assert [p.name for p in tmp_path.iterdir()] == ["file.txt"] and path.read_text() == "old"


def test_training_does_not_disturb_the_callers_random_numbers():
    network = nn.Linear(1, 1)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    train(network, squared, Line(), TrainConfig(steps=2, device="cpu"))
    assert torch.equal(torch.rand(2), expected)


def test_tensorboard_events_are_written_where_it_is_installed(tmp_path):
    pytest.importorskip("tensorboard")
    run, _ = run_line(tmp_path, steps=2)
    assert list(run.folder.glob("events.out.tfevents.*"))


def test_results_name_the_processor_that_they_were_measured_on(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    assert machine.describe_machine()["processor"] == machine.platform.machine()
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A Chip 3: fast\nflags\t: fpu\n")
    assert machine.describe_machine()["processor"] == "A Chip 3: fast"
