"""Read parquet files that hold the images themselves: of img2dataset, or Dataset.to_parquet of Hugging Face.

The columns are diffusers' (image, text) or img2dataset's (jpg, caption). pip install pyarrow.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from lesson_06_miniglide.image_data import records as problem
from lesson_06_miniglide.image_data.readers import Found
from lesson_06_miniglide.image_data.records import Columns, EncodedRecord, Files, Record, to_record

ROWS = 64  # read at once


def open_parquet(path: Path) -> Any:
    """Return an open pyarrow.parquet.ParquetFile. Raises UserError if pyarrow is not installed."""
    try:
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise UserError(f"--data-dir: {path} needs a library: pip install pyarrow") from None
    return ParquetFile(path)


@dataclass
class ParquetTable:
    """The records of a parquet file, which is read in one pass by every iteration."""

    folder: Path  # of the data set
    path: str  # below the folder
    image_column: str
    caption_column: str

    def __iter__(self) -> Iterator[Record]:
        number = 0
        try:
            with open_parquet(self.folder / self.path) as file:
                present = set(file.schema_arrow.names)
                for column in (self.image_column, self.caption_column):
                    if column not in present:
                        yield Record(self.path, "", f"it has no column {column}")
                        return
                wanted = present & {self.image_column, self.caption_column, "key", "status"}
                for batch in file.iter_batches(batch_size=ROWS, columns=sorted(wanted)):
                    for row in batch.to_pylist():
                        name = f"{self.path}/{row.get('key', number)}"
                        image, captions = row[self.image_column], row[self.caption_column]
                        yield row_to_record(name, image, captions, row.get("status"))
                        number += 1
        except Exception as error:  # pyarrow raises many kinds for broken files
            reason = str(error).partition("\n")[0]
            yield Record(self.path, "", f"it cannot be read from row {number} on ({reason})")


def row_to_record(name: str, image: Any, captions: Any, status: Any = None) -> Record:
    """Return the record of a row.

    name: of the row. image: encoded bytes, a path, or Hugging Face's dictionary of both. status: of
    img2dataset.
    """
    data, path = (image.get("bytes"), image.get("path")) if isinstance(image, dict) else (image, None)
    if isinstance(data, str):
        data, path = None, data
    trouble = problem.NOT_DOWNLOADED if status not in (None, "success") else None
    if not isinstance(data, bytes | None) or not (data or path):
        data, trouble = None, trouble or problem.NOT_BYTES
    record = to_record(name if data or not path else path, captions, trouble)
    return EncodedRecord.of(record, data) if data else record


def of_split(paths: list[str], split: str) -> list[str]:
    """Return the files with the split's name in their path, as in train-00000-of-00002.parquet.

    Without any, all files are the split "train", as in Hugging Face's library. Raises UserError for others.
    """
    found = [path for path in paths if split in re.split(r"[^A-Za-z]+", path)]
    if not found and split != "train":
        raise UserError(f"--split {split}: no .parquet file has {split} in its name; there is {paths[0]}")
    return found or paths


def read_parquet(folder: Path, files: Files, columns: Columns) -> Found | None:
    """Read parquet files with images. Raises UserError without pyarrow, or if a column is missing."""
    tables = [path for path in files if path.endswith(".parquet") and files[path] != problem.NOT_A_FILE]
    if not tables:
        return None
    paths = of_split(tables, columns.split)
    reasons = []
    for path in paths:
        try:
            with open_parquet(folder / path) as file:
                names = file.schema_arrow.names
            break
        except UserError:
            raise
        except Exception as error:  # pyarrow raises many kinds for broken files
            reasons.append(str(error).partition("\n")[0])
    else:
        raise UserError(f"--data-dir: {paths[0]} cannot be read ({reasons[0]})")
    chosen = columns.choose(names, f"--data-dir: {path}")
    others = [Record(path, "", problem.OTHER_SPLIT) for path in tables if path not in paths]
    return Found(paths[0], others, set(paths), streams=[ParquetTable(folder, p, *chosen) for p in paths])
