"""One reader per layout: which image has which captions. layouts.py tries them in turn.

A reader gets the data folder and its files, and returns None if the folder is not in its layout.
"""

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from posixpath import basename, dirname, normpath
from typing import Any, NamedTuple

from common.errors import UserError
from common.files import read_text
from lesson_06_miniglide.image_data import records as problem
from lesson_06_miniglide.image_data.image_finder import ImageFinder, normalized
from lesson_06_miniglide.image_data.records import Files, Record, is_image, to_record

BREED_FOLDER = re.compile(r"n\d{8}-(.+)")
METADATA_COLUMNS = {  # name of the file -> columns with the image's name and its caption
    "metadata.jsonl": ("file_name", "text"),
    "metadata.csv": ("file_name", "text"),
    "captions.txt": ("image", "caption"),
}


class Found(NamedTuple):
    """What a reader found."""

    decided_by: str  # the file or folder that showed the layout
    records: list[Record]
    read: set[str]  # files with captions that were read
    unlisted: str = problem.NO_CAPTION  # problem of images without a record
    streams: Sequence[Iterable[Record]] = ()  # more records, those in large files; each is read in one pass


def is_captions(path: str) -> bool:
    """Return whether a file has the name of a file with captions."""
    name = basename(path)
    return name.lower().endswith(problem.CAPTION_SUFFIXES) or name in METADATA_COLUMNS or is_coco(path)


def is_coco(path: str) -> bool:
    """Return whether a file has the name of MS COCO's captions."""
    return fnmatch(basename(path), "captions_*.json")


def stem_of(path: str) -> str:
    """Return a path without its suffix, in the form in which names are compared."""
    return normalized(os.path.splitext(path)[0])


def read_dogs(folder: Path, files: Files) -> Found | None:
    """Read Stanford Dogs: in n02089078-black-and-tan_coonhound, the breed follows the first hyphen."""
    records = []
    for path in filter(is_image, files):
        parent = (folder.resolve() / path).parent.name
        if breed := BREED_FOLDER.fullmatch(parent):
            records.append(to_record(path, breed[1].replace("_", " ")))
    return Found(dirname(records[0].image) or folder.name, records, set()) if records else None


def read_coco(folder: Path, files: Files) -> Found | None:
    """Read MS COCO: val2017/000000000139.jpg, with captions in annotations/captions_val2017.json.

    Files of captions without a single image here are left out. Raises UserError if one has another
    structure, or if it is not clear which image it means.
    """
    images = list(filter(is_image, files))
    split_of = {path: Path(path).stem.partition("_")[2] for path in filter(is_coco, files)}
    used, records, left_out = [], [], []
    for path, split in split_of.items():
        try:
            content = json.loads(read_text(folder / path, "surrogateescape"))
            captions: dict[Any, list[Any]] = {}
            for row in content["annotations"]:
                texts = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
                captions.setdefault(row["image_id"], []).extend(texts)
            rows = [(normpath(row["file_name"]), captions.get(row["id"])) for row in content["images"]]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"--data-dir: {path} is not in the layout of MS COCO ({error!r})") from None
        finder = ImageFinder(folder, images, path, split, set(split_of.values()) - {split})
        found = [finder.find(name) for name, _ in rows]
        if any(found):
            used.append(path)
            for image, (name, caption) in zip(found, rows):
                records.append(to_record(image or name, caption, None if image else problem.NO_IMAGE))
        else:
            left_out.append(Record(path, "", problem.NO_IMAGES_HERE))
    return Found(used[0], records + left_out, set(split_of)) if used else None


def read_imagefolder(folder: Path, files: Files) -> Found | None:
    """Read Hugging Face's metadata.jsonl and metadata.csv. Raises UserError without a column `text`."""
    return read_tables(folder, files, ("metadata.jsonl", "metadata.csv"))


def read_flickr(folder: Path, files: Files) -> Found | None:
    """Read Flickr8k: captions.txt begins with the line "image,caption" and has five rows per image."""
    return read_tables(folder, files, ("captions.txt",))


def read_tables(folder: Path, files: Files, names: Iterable[str]) -> Found | None:
    """Read tables of these names with one row per caption, of as many captions per image as there are."""
    images = list(filter(is_image, files))
    records: list[Record] = []
    used: list[str] = []
    for path in files:
        if basename(path) not in names or files[path] == problem.NOT_A_FILE:
            continue
        image_column, caption_column = METADATA_COLUMNS[basename(path)]
        rows = read_rows(folder, path)
        columns = {column for row in rows for column in row if column is not None}
        if path.endswith(".txt") and not columns >= {image_column, caption_column}:
            continue  # the caption of captions.jpg, or some text
        if rows and caption_column not in columns:
            listed = ", ".join(sorted(columns))
            raise UserError(f"--data-dir: {path} has no column `{caption_column}`, only {listed}")
        finder = ImageFinder(folder, images, path)
        for row in rows:
            name = row.get(image_column)
            if not name or not isinstance(name, str):
                records.append(Record(path, "", f"a row without {image_column}"))
                continue
            image = finder.find(name)
            trouble = None if image else problem.NO_IMAGE
            if None in row:  # csv puts the fields after the last column there
                trouble = problem.TOO_MANY_FIELDS
            image = image or normpath(f"{dirname(path)}/{name}").lstrip("/")
            records.append(to_record(image, row.get(caption_column), trouble))
        used += [path] * bool(rows)
    return Found(used[0], records, set(used)) if used else None


def read_rows(folder: Path, path: str) -> list[dict[Any, Any]]:
    """Return the rows of a .jsonl or of a table with commas; a line that is not JSON becomes an empty row."""
    csv.field_size_limit(2**31 - 1)
    try:
        text = read_text(folder / path, "surrogateescape")
        if not path.endswith(".jsonl"):
            return list(csv.DictReader(io.StringIO(text, newline="")))
    except (UnicodeError, csv.Error) as error:
        raise UserError(f"--data-dir: {path} is not text in UTF-8, or not a table ({error})") from None
    rows = []
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        rows.append(row if isinstance(row, dict) else {})
    return rows


def read_img2dataset(folder: Path, files: Files) -> Found | None:
    """Read img2dataset's folders. Rows that could not be downloaded have a .json and no image.

    A .json without `status` counts as a broken row if an image has its name or if its name is a number; other
    .json files are ignored. A folder without a single readable row is not in this layout.
    """
    image_of = {stem_of(path): path for path in files if is_image(path)}
    records, read = [], []
    for path in files:
        if not path.endswith(".json") or path.endswith("_stats.json") or files[path] == problem.NOT_A_FILE:
            continue
        image = image_of.get(stem_of(path))
        try:
            row = json.loads(read_text(folder / path, "surrogateescape"))
            caption, status = row["caption"], row["status"]
        except (ValueError, KeyError, TypeError):
            if image or Path(path).stem.isdigit():
                records.append(Record(image or path, "", problem.BROKEN_JSON))
            continue
        trouble = None if image else problem.NO_IMAGE
        if status != "success":
            trouble = problem.NOT_DOWNLOADED
        records.append(to_record(image or path, caption, trouble))
        read.append(path)
    texts = {f"{path.removesuffix('.json')}.txt" for path in read}  # the same captions once more
    return Found(read[0], records, texts, problem.NO_JSON) if read else None


def read_sidecars(folder: Path, files: Files) -> Found | None:
    """Read images whose captions are in text files of the same name, one per line."""
    present = [path for path, state in files.items() if state != problem.NOT_A_FILE]
    texts = [path for path in present if path.lower().endswith(problem.CAPTION_SUFFIXES)]
    text_of = {stem_of(path): path for path in texts}
    text_of |= {os.path.splitext(path)[0]: path for path in texts}  # the exact name is the better one
    records, read = [], []
    for path in filter(is_image, files):
        text = text_of.get(os.path.splitext(path)[0]) or text_of.get(stem_of(path))
        if not text:
            records.append(Record(path, "", problem.NO_TEXT))
            continue
        read.append(text)
        try:
            lines = read_text(folder / text, "surrogateescape").split("\n")
            records.append(to_record(path, [line for line in lines if line.strip()]))
        except UnicodeError:
            records.append(Record(path, "", problem.NOT_UTF8))
    return Found(read[0], records, set(read), problem.NO_TEXT) if read else None
