"""A short training script; tests of signals, streams, disks and resuming call it as a person would."""

import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from common.cli import run_command
from common.training.config import TrainConfig
from common.training.metrics_csv import read_metrics
from common.training.run_dir import RunDir, saved_config
from common.training.train import train

ROOT = Path(__file__).parent.parent
SCRIPT = str(Path(__file__))
ENV = {**os.environ, "PYTHONPATH": str(ROOT)}


class Line:
    """Points on a line."""

    name = "line"
    pause = 0.0  # seconds per step

    def __init__(self):
        self.x = torch.arange(64)[:, None] / 64

    def __len__(self):
        return 64

    def batch(self, indices):
        time.sleep(self.pause)
        return self.x[indices], 3 * self.x[indices]


def squared(network, x, y):
    return (network(x) - y).square().mean(1)


def main(config: TrainConfig) -> None:
    data = Line()
    run = RunDir("lesson_test", config, data.name)
    torch.manual_seed(config.seed)
    train(nn.Sequential(nn.Linear(1, 8), nn.Linear(8, 1)), squared, data, config, run=run)
    print("a caption: 一只狗 \udce9")


def run_line(*flags):
    """Run this script with these flags in this process."""
    run_command(main, TrainConfig, saved_config, ["--device", "cpu", *map(str, flags)])


def error_of(capsys, *flags):
    """Return what a run ends with: one line, without a traceback."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_line(*flags)
    err = capsys.readouterr().err.replace("\r", "\n")
    assert stop.value.code == 2 and "Traceback" not in err, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def steps_of(run):
    """Return the steps in a run's metrics.csv."""
    return [row["step"] for row in read_metrics(run / "metrics.csv")]


if __name__ == "__main__":
    Line.pause = 0.01  # a signal comes before the end
    run_command(main, TrainConfig, saved_config)
