"""A run is a folder: configuration, metrics, previews, and checkpoints that are either complete or absent."""

import csv
import dataclasses
import shlex
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

import torch
from matplotlib.figure import Figure
from torch import Tensor

from common.cli import flag_name
from common.device import describe_machine
from common.errors import UserError
from common.files import ROOT, make_folder, read_json, write_atomically, write_json
from common.plotting import plot_losses
from common.protocols import Metadata
from common.training.checkpoints import find_training_state, load_training_state, save_weights
from common.training.config import TrainConfig, config_from_dict
from common.training.metrics_csv import METRIC_COLUMNS, format_row, read_metrics, write_metrics
from common.training.trainer import Callback, Row, Trainer

Config = TypeVar("Config")


class RunDir:
    """runs/<lesson>/<time>/ with config.json, metrics.csv, loss.png, samples/ and checkpoints/.

    data: the data set's name, which a resumed run may not change. keep_last: how many checkpoints are kept;
    None keeps all. resume_command: printed when the run is stopped; by default this command with --resume.

    `state` is the training state to continue from, or None. `reference_csv` is the metrics.csv of the run
    behind the lesson's pretrained weights, plotted for comparison. Raises UserError if the folder belongs to
    another run, or if a resumed run differs from it.
    """

    def __init__(
        self,
        lesson: str,
        config: TrainConfig,
        data: str,
        keep_last: int | None = 2,
        resume_command: str | None = None,
    ):
        self.keep_last = keep_last
        self.info: dict[str, Any] = {"lesson": lesson, "data": data, "config": dataclasses.asdict(config)}
        self.state_file: Path | None = None
        self.state: dict[str, Any] | None = None
        if config.resume:
            self.continue_run(config)
        else:
            self.start_run(config)
        self.reference_csv: Path | None = ROOT / lesson / "results" / "metrics.csv"
        self.info["machine"] = describe_machine(config.device)
        self.resume_command = resume_command or shlex.join(
            ["python", sys.argv[0], "--resume", str(self.folder)]
        )
        for folder in (self.folder, self.folder / "samples", self.folder / "checkpoints"):
            make_folder(folder, "--out")
        if not config.resume:
            self.write_json("config.json", self.info)
        self.tensorboard = tensorboard_writer(self.folder)
        print(f"run: {self.folder}")

    def start_run(self, config: TrainConfig) -> None:
        lesson = self.info["lesson"]
        self.folder = Path(config.out or f"runs/{lesson}/{datetime.now():%Y-%m-%d_%H-%M-%S}")
        self.info["command"] = " ".join(["python", *map(shlex.quote, sys.argv)])
        if any(self.folder.glob("checkpoints/step_*.pt")):
            raise UserError(f"--out {self.folder} already holds a run; use --resume, or name another folder")
        if any(self.folder.glob("*")) and not (self.folder / "config.json").exists():
            raise UserError(f"--out {self.folder} is not empty; name another folder")

    def continue_run(self, config: TrainConfig) -> None:
        assert config.resume
        self.state_file = find_training_state(config.resume)
        self.state = load_training_state(self.state_file)
        self.folder = self.state_file.parent.parent
        old = read_json(self.folder / "config.json")
        self.info["command"] = old["command"]
        if old["lesson"] != self.info["lesson"]:
            raise UserError(f"--resume {self.folder} is a run of {old['lesson']}; use that lesson's script")
        if old["data"] != self.info["data"]:
            raise UserError(
                f"--resume {self.folder} was trained on {old['data']}, the data now is {self.info['data']}"
            )
        for name in config.immutable_on_resume:
            if (before := old["config"].get(name)) != self.info["config"][name]:
                raise UserError(f"--resume {self.folder}: {flag_name(name)} was {before} and cannot change")
        if config.out and Path(config.out) != self.folder:
            raise UserError(f"--resume {self.folder} continues in that folder; leave out --out {config.out}")

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file into the run's folder."""
        write_json(self.folder / name, content, allow_nan=False)

    def finish(self, metrics: dict[str, Any], figure_name: str, figure: Figure) -> None:
        """Write metrics.json and the final figure, and print where they are."""
        command, machine = self.info["command"], self.info["machine"]
        self.write_json("metrics.json", {"command": command, **metrics, "machine": machine})
        figure.savefig(self.folder / figure_name)
        print(
            f"look at {self.folder / figure_name}; numbers are in metrics.json next to it\nrun: {self.folder}"
        )

    def open_metrics(self, step: int) -> None:
        """Start metrics.csv, or continue it after row `step`."""
        self.write_json("config.json", self.info)
        path = self.folder / "metrics.csv"
        rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        write_atomically(path, lambda part: write_metrics(part, rows))
        self.metrics_file = open(  # noqa: SIM115 (open as long as the run)
            path, "a", newline="", buffering=1, encoding="utf-8"
        )
        self.metrics = csv.DictWriter(self.metrics_file, METRIC_COLUMNS)

    def log(self, row: Row) -> None:
        """Append a row to metrics.csv, and to TensorBoard if it is installed."""
        self.metrics.writerow(format_row(row))
        if self.tensorboard:
            for name, value in row.items():
                self.tensorboard.add_scalar(name, value, row["step"])

    def save(self, state: dict[str, Any], weights: dict[str, Tensor], metadata: Metadata, best: bool) -> None:
        """Write a checkpoint: training state, weights with metadata, and a copy of the best weights.

        Of the checkpoints up to this step, the latest `keep_last` are kept. Checkpoints of later steps are
        removed: a run that was resumed from an earlier one replaces them.
        """
        folder, name = self.folder / "checkpoints", f"step_{state['step']:07d}"
        metadata = self.info | dict(metadata) | {"step": state["step"]}
        for file in [f"{name}.safetensors"] + ["best.safetensors"] * best:
            write_atomically(folder / file, lambda path: save_weights(path, weights, metadata))
        self.state_file = folder / f"{name}.pt"
        write_atomically(self.state_file, lambda path: torch.save(state, path))
        files = sorted(folder.glob("step_*.pt"))
        earlier = [file for file in files if file <= self.state_file]
        kept = earlier[-self.keep_last :] if self.keep_last else earlier
        for old in files:
            if old not in kept:
                old.unlink()
                old.with_suffix(".safetensors").unlink(missing_ok=True)


class Recorder(Callback):
    """Writes a training run into its folder: metrics, checkpoints, the loss curve and previews.

    preview: averaged network -> figure, saved at every checkpoint, or every `preview_every` steps if given.
    """

    def __init__(
        self,
        run: RunDir,
        metadata: Metadata,
        preview: Callable[[Any], Figure] | None = None,
        preview_every: int | None = None,
    ):
        self.run, self.metadata = run, dict(metadata)
        self.preview, self.preview_every = preview, preview_every

    def on_start(self, trainer: Trainer) -> None:
        trainer.last_checkpoint = self.run.state_file
        self.run.open_metrics(trainer.step)

    def on_log(self, trainer: Trainer, row: Row) -> None:
        self.run.log(row)
        if self.preview_every and trainer.step % self.preview_every == 0:
            self.save_preview(trainer)

    def on_checkpoint(self, trainer: Trainer, row: Row, stopping: bool) -> None:
        best = row["validation_loss"] <= trainer.best_validation_loss  # False for NaN
        metadata = self.metadata | {"validation_loss": row["validation_loss"], "minutes": trainer.minutes}
        self.run.save(trainer.state(), trainer.ema.network.state_dict(), metadata, best)
        trainer.last_checkpoint = self.run.state_file
        rows = read_metrics(self.run.folder / "metrics.csv")
        plot_losses(rows, reference_rows(self.run.reference_csv)).savefig(self.run.folder / "loss.png")
        if self.preview and not self.preview_every and not stopping:
            self.save_preview(trainer)

    def on_stop(self, trainer: Trainer) -> None:
        print(f"\nstopped and saved at step {trainer.step}; to continue: {self.run.resume_command}")

    def save_preview(self, trainer: Trainer) -> None:
        if self.preview:
            figure = self.preview(trainer.ema.network)
            figure.savefig(self.run.folder / "samples" / f"step_{trainer.step:07d}.png")


def reference_rows(path: Path | None) -> list[Row] | None:
    """Return the rows of a reference run's metrics.csv, if there is one."""
    return read_metrics(path) if path and path.exists() else None


def saved_config(resume: str, config_type: type[Config]) -> Config:
    """Return the configuration of the run to resume; fields that it did not have keep their defaults."""
    saved = read_json(find_training_state(resume).parent.parent / "config.json")["config"]
    known = {field.name for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    values = {k: v for k, v in saved.items() if k in known}
    return config_from_dict(config_type, values | {"out": None, "dry_run": False})


def tensorboard_writer(folder: Path) -> Any:
    """Return a TensorBoard writer, or None if TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder)
