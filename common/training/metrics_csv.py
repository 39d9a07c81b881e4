"""What is recorded of each training step: a row of metrics.csv, and TensorBoard where it is installed."""

import contextlib
import csv
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

from tqdm import tqdm

from common.files import write_atomically, write_error

Row = dict[str, Any]
METRIC_COLUMNS = [
    "step", "minutes", "loss", "grad_norm", "learning_rate", "images_per_second", "validation_loss"
]  # fmt: skip


def format_row(row: Row) -> dict[str, Any]:
    """Return a row as the file holds it: floats with six significant digits."""
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def write_metrics(path: Path, rows: list[Row]) -> None:
    """Write a metrics.csv with these rows."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, METRIC_COLUMNS)
        writer.writeheader()
        writer.writerows(map(format_row, rows))


def read_metrics(path: Path | str) -> list[Row]:
    """Return the rows of a metrics.csv as numbers, without empty cells and a last row that was cut off."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = file.readlines()
    if lines and is_cut_off(lines[-1], lines[0].count(",")):
        del lines[-1]
    rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(lines)]
    return [row | {"step": int(row["step"])} for row in rows if "step" in row]


def is_cut_off(line: str, commas: int) -> bool:
    """Return whether a line without an end is only the beginning of a row, as on a full disk."""
    return not line.endswith("\n") and (line.count(",") < commas or line[-1] in "e+-")


def reference_rows(path: Path | None) -> list[Row] | None:
    """Return the rows of a metrics.csv, if there is one."""
    return read_metrics(path) if path and path.exists() else None


def downsample_metrics(rows: list[Row], steps_per_row: int) -> list[Row]:
    """Return the same curve in fewer rows: each is the mean of several steps, labelled with the last one."""
    means = []
    for group in (rows[i : i + steps_per_row] for i in range(0, len(rows), steps_per_row)):
        names = [name for name in METRIC_COLUMNS if any(name in row for row in group)]
        mean = {name: fmean(row[name] for row in group if name in row) for name in names}
        means.append(mean | {"step": group[-1]["step"]})
    return means


class MetricsLog:
    """The open metrics.csv of a run, with the rows that it has up to `step`; and TensorBoard's event file.

    A broken TensorBoard is a warning. Raises UserError if metrics.csv cannot be written.
    """

    def __init__(self, folder: Path, step: int):
        self.path = folder / "metrics.csv"
        rows = [row for row in reference_rows(self.path) or [] if row["step"] <= step] if step else []
        write_atomically(self.path, lambda part: write_metrics(part, rows))
        self.file = open(  # noqa: SIM115 (open as long as the run)
            self.path, "a", newline="", buffering=1, encoding="utf-8"
        )
        self.writer = csv.DictWriter(self.file, METRIC_COLUMNS)
        self.tensorboard = tensorboard_writer(folder)

    def write(self, row: Row) -> None:
        """Append a row. Raises UserError if the disk is full."""
        try:
            self.writer.writerow(format_row(row))
        except OSError as error:
            with contextlib.suppress(OSError):
                self.file.close()
            raise write_error(self.path, error) from None
        if self.tensorboard:
            try:
                for name, value in row.items():
                    self.tensorboard.add_scalar(name, value, row["step"])
            except Exception as error:  # of a library that training does not need
                warn_of_tensorboard(error)
                self.tensorboard = None


def tensorboard_writer(folder: Path) -> Any:
    """Return a TensorBoard writer, or None if TensorBoard is not installed or, with a warning, is broken."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(folder)
    except Exception as error:  # of a library that training does not need
        if not (isinstance(error, ModuleNotFoundError) and error.name == "tensorboard"):
            warn_of_tensorboard(error)
        return None


def warn_of_tensorboard(error: Exception) -> None:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    tqdm.write(f"warning: training goes on without TensorBoard ({reason})", file=sys.stderr)
