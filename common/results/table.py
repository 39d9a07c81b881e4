"""Results tables: JSON files whose rows are measured one by one and are never measured twice."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from common.device import describe_machine
from common.errors import UserError
from common.files import read_json, write_json

Row = dict[str, Any]


class ResultsTable:
    """A JSON file {settings, machine, rows} that is written after every row.

    Opened again, it returns the rows it has and measures only those that are missing. Raises UserError if the
    file was made with other settings, because its rows would be lost.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], device: str = "auto", seed: int = 0):
        self.path, self.seed = path, seed
        self.content: dict[str, Any] = {
            "settings": dict(settings),
            "machine": describe_machine(device),
            "rows": [],
        }
        if path.exists():
            self.content = read_json(path)
            if change := describe_difference(self.content.get("settings", {}), settings):
                raise UserError(f"{path} was made with other settings ({change}); name another --out")

    @property
    def rows(self) -> list[Row]:
        return self.content["rows"]

    def row(self, measure: Callable[[], Mapping[str, Any]], **key: Any) -> Row:
        """Return the row with this key and the table's seed; if there is none, add `key | measure()`."""
        key["seed"] = self.seed
        for row in self.rows:
            if row.items() >= key.items():
                return row
        started = time.monotonic()
        row = key | dict(measure())
        row["minutes"] = round((time.monotonic() - started) / 60, 2)
        if self.path.exists():  # a process with another seed may have added rows
            self.content = read_json(self.path)
        self.rows.append(row)
        write_json(self.path, self.content)
        print(row, flush=True)
        return row


def describe_difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return in words how two settings differ where both have a value; "" if they do not."""
    changes = (name for name in sorted(before.keys() & now.keys()) if before[name] != now[name])
    return ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changes)


def format_cell(value: Any) -> str:
    """Return a value with three significant digits; "-" where there is none."""
    if value is None or (isinstance(value, float) and value != value):
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def format_table(rows: Sequence[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Return rows as a text with aligned columns; all columns of the first row, or those that are named."""
    columns = columns or [name for name in rows[0] if name not in ("seed", "minutes")]
    cells = [[format_cell(row.get(name)) for name in columns] for row in rows]
    return pd.DataFrame(cells, columns=list(columns)).to_string(index=False)


def read_table(path: str | Path, *columns: str) -> str:
    """Return a results file as a text; all columns, or those that are named."""
    return format_table(read_json(path)["rows"], columns or None)


def pivot_table(path: str | Path, down: str, across: str, value: str) -> str:
    """Return one number of a results file as a text, with a line per `down` and a column per `across`."""
    rows = pd.DataFrame(read_json(path)["rows"])
    table = rows.pivot_table(value, down, across, sort=False, aggfunc="last")
    return table.reset_index().map(format_cell).to_string(index=False)
