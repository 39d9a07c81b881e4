"""A run is a folder: configuration, metrics, previews, and checkpoints that are either complete or absent."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from matplotlib.figure import Figure
from torch import Tensor

from common.device import describe_machine
from common.errors import UserError
from common.files import (
    ROOT,
    lock_file,
    make_folder,
    make_new_folder,
    read_json,
    write_atomically,
    write_json,
)
from common.plotting import plot_losses
from common.protocols import Metadata
from common.training.checkpoints import (
    find_training_state,
    load_training_state,
    non_finite,
    save_training_state,
    save_weights,
)
from common.training.config import TrainConfig, config_from_dict
from common.training.fingerprint import data_fingerprint
from common.training.metrics_csv import MetricsLog, read_metrics, reference_rows
from common.training.resuming import (
    describe_changes,
    launch_command,
    num_processes,
    refuse_other_data,
    refuse_settings,
)
from common.training.trainer import Callback, Row, Trainer

Config = TypeVar("Config")


class RunDir:
    """runs/<lesson>/<time>/ with config.json, metrics.csv, loss.png, samples/ and checkpoints/.

    The folder is this run's alone: it is created for it, and locked until training ends. data: the data set's
    name. keep_last: how many checkpoints are kept; None keeps all. resume_command: printed when the run is
    stopped; by default this command with --resume.

    `state` is the training state to continue from, or None. `reference_csv` is the metrics.csv of the run
    behind the lesson's pretrained weights, plotted for comparison. Raises UserError if the folder belongs to
    another run.

    A resumed run must have the same data and the same `immutable_on_resume` settings, else UserError is
    raised. Other settings may change, as the budget, the learning rate or, on a smaller GPU, the batch size;
    each change is printed. A run that changes nothing ends bit for bit where it would have ended without the
    interruption, if its budget is in steps and the number of threads is the same.
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
        self.info |= {"machine": describe_machine(config.device), "processes": num_processes()}
        self.old: dict[str, Any] | None = None  # config.json of the run to resume
        self.state_file: Path | None = None
        self.state: dict[str, Any] | None = None
        if config.resume:
            self.continue_run(config)
        else:
            self.start_run(config)
        self.reference_csv: Path | None = ROOT / lesson / "results" / "metrics.csv"
        self.resume_command = resume_command or launch_command("--resume", str(self.folder))
        for folder in ("samples", "checkpoints"):
            make_folder(self.folder / folder, "--out")
        if not config.resume:
            self.write_json("config.json", self.info)
        print(f"run: {self.folder}")

    def start_run(self, config: TrainConfig) -> None:
        lesson = self.info["lesson"]
        self.info["command"] = launch_command()
        if config.out is None:
            self.folder = make_new_folder(Path(f"runs/{lesson}/{datetime.now():%Y-%m-%d_%H-%M-%S}"), "--out")
        else:
            self.folder = Path(config.out)
            if any(self.folder.glob("checkpoints/step_*.pt")):
                raise UserError(f"--out {config.out} already holds a run; use --resume or another folder")
            if any(self.folder.glob("*")) and not (self.folder / "config.json").exists():
                raise UserError(f"--out {self.folder} is not empty; name another folder")
            make_folder(self.folder, "--out")
        self.lock("--out")

    def continue_run(self, config: TrainConfig) -> None:
        assert config.resume
        self.state_file = find_training_state(config.resume)
        self.folder = self.state_file.parent.parent
        self.old = old = read_json(self.folder / "config.json")
        self.info["command"] = old["command"]
        if old["lesson"] != self.info["lesson"]:
            raise UserError(f"--resume {self.folder} is a run of {old['lesson']}; use that lesson's script")
        refuse_settings(self.folder, old["config"], self.info["config"], config.immutable_on_resume)
        if config.out and Path(config.out) != self.folder:
            raise UserError(f"--resume {self.folder} continues in that folder; leave out --out {config.out}")
        self.state = load_training_state(self.state_file)
        self.lock("--resume")
        if changes := describe_changes(old, self.info):
            print(changes)

    def lock(self, flag: str) -> None:
        """Keep the folder to this process. Raises UserError if another one has it."""
        try:
            self.lock_file = lock_file(self.folder / "lock", wait=False)
        except BlockingIOError:
            message = "another process is training in this folder; wait for it, or stop it"
            raise UserError(f"{flag} {self.folder}: {message}") from None

    def check_data(self, fingerprint: str | None) -> None:
        """Record the fingerprint of the data. Raises UserError if the run to resume had other data."""
        self.info["fingerprint"] = fingerprint
        if self.old:
            refuse_other_data(self.folder, self.old, self.info)

    def write_json(self, name: str, content: dict[str, Any]) -> None:
        """Write a JSON file into the run's folder."""
        write_json(self.folder / name, content, allow_nan=False)

    def finish(self, metrics: dict[str, Any], figure_name: str, figure: Figure) -> None:
        """Write metrics.json and the final figure, and print where they are."""
        command, machine = self.info["command"], self.info["machine"]
        self.write_json("metrics.json", {"command": command, **metrics, "machine": machine})
        write_atomically(self.folder / figure_name, figure.savefig)
        print(
            f"look at {self.folder / figure_name}; numbers are in metrics.json next to it\nrun: {self.folder}"
        )

    def open_metrics(self, step: int) -> None:
        """Start metrics.csv, or continue it after row `step`."""
        self.write_json("config.json", self.info)
        self.metrics = MetricsLog(self.folder, step)

    def save(self, state: dict[str, Any], weights: dict[str, Tensor], metadata: Metadata, best: bool) -> None:
        """Write a checkpoint: training state, weights with metadata, and a copy of the best weights.

        Of the checkpoints up to this step, the latest `keep_last` are kept. Checkpoints of later steps are
        removed: a run that was resumed from an earlier one replaces them. Raises UserError if a file cannot
        be written, or if a weight is not finite; the earlier checkpoints are then as they were.
        """
        folder, name = self.folder / "checkpoints", f"step_{state['step']:07d}"
        if broken := non_finite(state):
            raise UserError(
                f"step {state['step']}: the weights are not finite ({broken}); try a smaller --learning-rate"
            )
        metadata = self.info | dict(metadata) | {"step": state["step"]}
        for file in [f"{name}.safetensors"] + ["best.safetensors"] * best:
            write_atomically(folder / file, lambda path: save_weights(path, weights, metadata))
        write_atomically(folder / f"{name}.pt", lambda path: save_training_state(path, state))
        self.state_file = folder / f"{name}.pt"
        earlier = sorted(file.stem for file in folder.glob("step_*.pt") if file.stem <= name)
        dropped = earlier[: -self.keep_last] if self.keep_last else []
        for old in folder.glob("step_*"):  # weights alone, too, if their state could not be written
            if old.stem > name or old.stem in dropped:
                old.unlink()


class Recorder(Callback):
    """Writes a training run into its folder: metrics, checkpoints, the loss curve and previews.

    preview: averaged network -> figure, saved after a minute and every `preview_every` steps or checkpoints.
    data: its fingerprint tells whether a resumed run has the same data; by default the trainer's data set.
    Errors name the last checkpoint and the command that continues from it.
    """

    def __init__(
        self,
        run: RunDir,
        metadata: Metadata,
        preview: Callable[[Any], Figure] | None = None,
        preview_every: int | None = None,
        data: Any = None,
    ):
        self.run, self.metadata, self.data = run, dict(metadata), data
        self.preview, self.preview_every, self.previewed = preview, preview_every, False

    def on_start(self, trainer: Trainer) -> None:
        trainer.last_checkpoint = self.run.state_file
        self.run.check_data(data_fingerprint(trainer.data if self.data is None else self.data))
        self.run.open_metrics(trainer.step)

    def on_log(self, trainer: Trainer, row: Row) -> None:
        with self.naming_checkpoint():
            self.run.metrics.write(row)
            first = trainer.minutes >= 1 and not self.previewed
            if first or (self.preview_every and trainer.step % self.preview_every == 0):
                self.save_preview(trainer)

    def on_checkpoint(self, trainer: Trainer, row: Row, stopping: bool) -> None:
        best = row["validation_loss"] <= trainer.best_validation_loss  # False for NaN
        metadata = self.metadata | {"validation_loss": row["validation_loss"], "minutes": trainer.minutes}
        with self.naming_checkpoint():
            self.run.save(trainer.state(), trainer.ema.network.state_dict(), metadata, best)
            trainer.last_checkpoint = self.run.state_file
            rows = read_metrics(self.run.folder / "metrics.csv")
            figure = plot_losses(rows, reference_rows(self.run.reference_csv))
            write_atomically(self.run.folder / "loss.png", figure.savefig)
            if self.preview and not self.preview_every and not stopping:
                self.save_preview(trainer)

    @contextlib.contextmanager
    def naming_checkpoint(self) -> Iterator[None]:
        """Add to a UserError where training can continue, if there is a checkpoint."""
        try:
            yield
        except UserError as error:
            last, command = self.run.state_file, self.run.resume_command
            hint = f"; the last checkpoint is {last}; to continue from it: {command}" if last else ""
            raise UserError(f"{error}{hint}") from None

    def on_stop(self, trainer: Trainer) -> None:
        print(f"\nstopped and saved at step {trainer.step}; to continue: {self.run.resume_command}")

    def on_end(self, trainer: Trainer) -> None:
        self.run.lock_file.close()

    def save_preview(self, trainer: Trainer) -> None:
        if self.preview:
            path = self.run.folder / "samples" / f"step_{trainer.step:07d}.png"
            write_atomically(path, self.preview(trainer.ema.network).savefig)
            print("" if self.previewed else f"\nfirst samples: {path}\n", end="")
            self.previewed = True


def saved_config(resume: str, config_type: type[Config]) -> Config:
    """Return the configuration of the run to resume; fields that it did not have keep their defaults."""
    saved = read_json(find_training_state(resume).parent.parent / "config.json")["config"]
    known = {field.name for field in dataclasses.fields(config_type)}  # type: ignore[arg-type]
    values = {k: v for k, v in saved.items() if k in known}  # `RunDir` refuses others
    return config_from_dict(config_type, values | {"out": None, "dry_run": False})
