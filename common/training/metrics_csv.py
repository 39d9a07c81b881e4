"""metrics.csv: one row per training step."""

import csv
from pathlib import Path
from statistics import fmean
from typing import Any

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
    """Return the rows of a metrics.csv as numbers; empty cells are left out."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows if "step" in row]


def downsample_metrics(rows: list[Row], steps_per_row: int) -> list[Row]:
    """Return the same curve in fewer rows: each is the mean of several steps, labelled with the last one."""
    means = []
    for group in (rows[i : i + steps_per_row] for i in range(0, len(rows), steps_per_row)):
        names = [name for name in METRIC_COLUMNS if any(name in row for row in group)]
        mean = {name: fmean(row[name] for row in group if name in row) for name in names}
        means.append(mean | {"step": group[-1]["step"]})
    return means
