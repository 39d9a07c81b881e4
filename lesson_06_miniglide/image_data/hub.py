"""Read data sets of Hugging Face with their library: from the Hub, or as save_to_disk wrote them.

    train.py --dataset-name NAME --image-column image --caption-column text --split train

The flags are those of diffusers' training scripts. pip install datasets.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from lesson_06_miniglide.image_data.parquet import row_to_record
from lesson_06_miniglide.image_data.readers import Found
from lesson_06_miniglide.image_data.records import Columns, Files, Record, Source

ROWS = 64  # read at once
PART = 512  # rows; so many are decoded at once, too, which keeps the order


@dataclass
class Rows:
    """The records of some rows of a data set."""

    dataset: Any  # a datasets.Dataset whose images are not decoded
    image_column: str
    caption_column: str
    name: str  # of the data set, in the names of the records
    rows: range

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[Record]:
        for start in self.rows[::ROWS]:
            try:
                batch = self.dataset[start : min(start + ROWS, self.rows.stop)]
            except Exception as error:  # of many kinds, if a file is damaged
                yield Record(f"{self.name}/{start}", "", f"rows cannot be read ({first_line(error)})")
                continue
            pairs = zip(batch[self.image_column], batch[self.caption_column])
            for i, (image, captions) in enumerate(pairs, start):
                yield row_to_record(f"{self.name}/{i}", image, captions)


def import_datasets(flag: str) -> Any:
    """Return Hugging Face's library. Raises UserError, naming the flag, if it is not installed."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{flag} needs a library: pip install datasets") from None
    return datasets


def to_streams(datasets: Any, dataset: Any, columns: Columns, flag: str, name: str) -> list[Rows]:
    """Return the records of a data set, in parts. Raises UserError if a column is missing."""
    image, caption = columns.choose(dataset.column_names, flag)
    dataset = dataset.with_format(None).select_columns(list(dict.fromkeys((image, caption))))
    try:
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    except Exception as error:  # of many kinds
        raise UserError(f"{flag}: --image-column {image} has no images ({first_line(error)})") from None
    starts = range(0, len(dataset), PART)
    parts = [range(start, min(start + PART, len(dataset))) for start in starts]
    return [Rows(dataset, image, caption, name, part) for part in parts]


def hub_source(name: str, config_name: str | None, columns: Columns) -> Source:
    """Return a data set of the Hub, downloaded by Hugging Face's library. Raises UserError.

    config_name: which of the data set's configurations, if it has several.
    """
    flag = f"--dataset-name {name}"
    datasets = import_datasets("--dataset-name")
    try:
        dataset = datasets.load_dataset(name, config_name, split=columns.split)
    except Exception as error:  # of many kinds: no network, no such data set, no such split
        raise UserError(f"{flag}: --split {columns.split} cannot be loaded ({first_line(error)})") from None
    streams = to_streams(datasets, dataset, columns, flag, name)
    identity = "_".join(filter(None, (name, config_name, columns.split)))
    state = f"{identity} {len(dataset)} {getattr(dataset, '_fingerprint', '')} {columns}"
    return Source(flag, identity, Path(), state, lambda: ("Hugging Face Hub", streams))


def read_saved(folder: Path, files: Files, columns: Columns) -> Found | None:
    """Read what save_to_disk wrote. Raises UserError without the library, the split or the columns."""
    marks = [name for name in ("dataset_dict.json", "state.json") if name in files]
    if not marks or (marks == ["state.json"] and "dataset_info.json" not in files):
        return None
    flag = f"--data-dir {folder}"
    datasets = import_datasets(flag)
    try:
        dataset = datasets.load_from_disk(str(folder))
    except Exception as error:  # of many kinds
        raise UserError(f"{flag} cannot be loaded ({first_line(error)})") from None
    splits = dataset if isinstance(dataset, dict) else {str(dataset.split or "train"): dataset}
    if columns.split in splits:
        dataset = splits[columns.split]
    elif isinstance(dataset, dict) or columns.split != "train":
        raise UserError(
            f"{flag} has no split {columns.split}, only {', '.join(splits)}; name it with --split"
        )
    return Found(marks[0], [], set(), streams=to_streams(datasets, dataset, columns, flag, folder.name))


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return str(error).partition("\n")[0] or type(error).__name__
