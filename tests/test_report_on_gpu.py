"""Lesson 6's experiment in pieces: it trains, stops in time, continues, measures and keeps what is small."""

import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from common.cli import run_command
from common.training.metrics_csv import read_metrics
from lesson_06_miniglide.training import report_on_gpu
from lesson_06_miniglide.training.report_on_gpu import Config, parts_of, run_until, train_command

TINY = ["--device", "cpu", "--preset", "tiny", "--batch-size", "4"]


def run(*flags):
    run_command(report_on_gpu.main, Config, argv=[*TINY, *map(str, flags)])


def num_steps(part):
    metrics = part.folder / "metrics.csv"
    return len(read_metrics(metrics)) if metrics.exists() else 0


@pytest.fixture
def dogs(tmp_path):
    """A folder in the layout of Stanford Dogs, with photos of noise."""
    generator = np.random.default_rng(0)
    for breed in ("n02085620-Chihuahua", "n02110185-Siberian_husky"):
        folder = tmp_path / "dogs" / "Images" / breed
        folder.mkdir(parents=True)
        for i in range(4):
            image = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / f"{breed.partition('-')[0]}_{i}.jpg")
    return tmp_path / "dogs"


@pytest.mark.slow
def test_a_dry_run_does_everything_and_a_second_one_nothing(dogs, place, capfd):
    flags = ["--dogs", dogs, "--dry-run", "--keep", "kept"]
    run(*flags)
    assert "done" in capfd.readouterr().out.splitlines()
    kept = place / "kept"
    assert {path.name for path in (kept / "dogs").iterdir()} >= {"config.json", "metrics.csv", "loss.png"}
    (row,) = json.loads((kept / "dogs_evaluation" / "evaluation.json").read_text())["rows"]
    assert row["n"] == 4 and row["fid"] > 0 and row["images_seen"] == 8
    assert not list(kept.rglob("*.safetensors")) and not list(kept.rglob("*.pt"))
    run(*flags)
    out = capfd.readouterr().out
    assert "done" in out.splitlines() and "run:" not in out  # nothing was trained again


@pytest.mark.slow
def test_a_run_that_was_stopped_continues_where_it_was(dogs, place, monkeypatch):
    commands = []
    (part,) = parts_of(Config(dogs=str(dogs)))

    def stop_after_a_step(command, deadline):
        commands.append(command)
        if "train.py" not in command[1]:
            return run_until(command, math.inf)
        steps = num_steps(part)
        with subprocess.Popen(command) as process:
            while process.poll() is None and num_steps(part) == steps:
                time.sleep(0.1)
            process.terminate()
        return False

    monkeypatch.setattr(report_on_gpu, "run_until", stop_after_a_step)
    uncompiled = lambda part, config: [c for c in train_command(part, config) if c != "--compile"]  # noqa: E731
    monkeypatch.setattr(report_on_gpu, "train_command", uncompiled)
    flags = ["--dogs", dogs, "--training", 60, "--num-samples", 4, "--evaluation", 1, "--piece", 2]
    run(*flags)
    first = read_metrics(part.folder / "metrics.csv")[-1]
    assert part.checkpoints and not part.is_trained and "--resume" not in commands[0]
    run(*flags)
    rows = read_metrics(part.folder / "metrics.csv")
    assert "--resume" in commands[-2]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1)) and len(rows) > first["step"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows ends a process at once")
def test_a_command_is_stopped_at_the_deadline_and_may_save_first(tmp_path):
    script = "import signal, sys, time; from pathlib import Path\n"
    script += (
        "signal.signal(signal.SIGTERM, lambda *_: (Path(sys.argv[1]).write_text('saved'), sys.exit(143)))\n"
    )
    script += "Path(sys.argv[2]).touch(); time.sleep(60)"
    command = [sys.executable, "-c", script, str(tmp_path / "state"), str(tmp_path / "started")]
    assert not run_until(command, time.monotonic() + 5)
    assert (tmp_path / "started").exists() and (tmp_path / "state").read_text() == "saved"
    assert run_until([sys.executable, "-c", ""], time.monotonic() + 60)


def test_a_failed_command_ends_the_experiment():
    with pytest.raises(SystemExit) as stop:
        run_until([sys.executable, "-c", "raise SystemExit(2)"], time.monotonic() + 60)
    assert stop.value.code == 2


def test_the_captions_of_kinds_are_measured_on_photos_that_were_held_out(tmp_path):
    config = Config(photos="PHOTOS", kinds=True, out=str(tmp_path))
    (part,) = parts_of(config)
    assert "--validation-fraction 0.1" in " ".join(train_command(part, config))
    assert "--kinds" in report_on_gpu.evaluate_command(part, config)


@pytest.mark.parametrize(
    "flags, message",
    [([], "name --dogs or --photos"), (["--evaluation", "20"], "--evaluation 20 leaves no time")],
)
def test_bad_flags_get_one_line(place, capsys, flags, message):
    with pytest.raises(SystemExit) as stop:
        run(*flags)
    assert stop.value.code == 2 and message in capsys.readouterr().err
    assert not list(place.iterdir())
