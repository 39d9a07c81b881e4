"""Find images and their captions in a folder. Five layouts are read into the same records.

    img2dataset   <shard>/<key>.jpg and <key>.json with caption, status and key      (SBU captions)
    dogs          Images/<wnid>-<Breed>/*.jpg, the breed is the caption              (Stanford Dogs)
    coco          captions_*.json next to the images, the first caption per image    (MS COCO)
    imagefolder   metadata.jsonl or metadata.csv with file_name and text             (Hugging Face)
    sidecars      name.jpg and name.txt, which contains the caption

This module opens no image; decoding.py does.
"""

import csv
import io
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from posixpath import normpath
from typing import Any, NamedTuple, TypeAlias

from common.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA_NAMES = ("metadata.jsonl", "metadata.csv")
BREED_FOLDER = re.compile(r"n\d{8}-(.+)")

# Problems of records. They are stored in caches, so a new wording would not match old caches.
NOT_DOWNLOADED = "never downloaded"  # by img2dataset
NO_CAPTION = "no caption is for it"
NO_IMAGE = "its image is missing"
BROKEN_JSON = "its .json is broken"
BENIGN_PROBLEMS = (NOT_DOWNLOADED, NO_CAPTION)  # a dead link, an image of another list: the data is intact

Files: TypeAlias = Mapping[str, tuple[int, int]]  # path below the data folder -> (bytes, modification time)


class Record(NamedTuple):
    """An image and its caption as the data set's files list them. Nothing has been opened yet."""

    image: str  # path below the data folder
    caption: str
    problem: str | None = None  # why there is no usable image


def read_records(folder: str | Path, files: Files, dogs: bool = False) -> list[Record]:
    """Return all records of a data set, in an order that depends only on the names of the files.

    files: from `list_files`. dogs: read the folder as Stanford Dogs instead of detecting its layout. Raises
    UserError if the folder has none of the layouts, or if a file with captions cannot be read.
    """
    for read in [read_dogs] if dogs else LAYOUTS:
        try:
            if records := read(Path(folder), files):
                return records
        except OSError as error:
            raise UserError(f"--data-dir: {error.filename} cannot be read ({error.strerror})") from None
    wanted = LAYOUTS[read_dogs] if dogs else "; ".join(LAYOUTS.values())
    raise UserError(f"--data-dir {folder} holds no images with captions; looked for {wanted}")


def list_files(folder: str | Path) -> dict[str, tuple[int, int]]:
    """Return path below `folder` -> (bytes, modification time in ns) of all files, sorted by path.

    Hidden files and dead links are left out, and links to folders are not followed. Raises UserError if the
    folder does not exist or cannot be read.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--data-dir {folder} is not a folder")
    found, pending = {}, [""]
    try:
        while pending:
            parent = pending.pop()
            with os.scandir(Path(folder) / parent) as entries:
                for entry in entries:
                    path = f"{parent}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(f"{path}/")
                    elif entry.is_file():
                        stat = entry.stat()
                        found[path] = (stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"--data-dir: {error.filename} cannot be read ({error.strerror})") from None
    return dict(sorted(found.items()))


def fingerprint(files: Files) -> str:
    """Return a hash of a folder's state, which changes when a file is added, removed or written."""
    digest = sha256()
    for path, (size, modified) in files.items():
        digest.update(f"{path}\0{size}\0{modified}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def is_image(path: str) -> bool:
    """Return whether a file has the name of an image."""
    return path.lower().endswith(IMAGE_SUFFIXES)


def stem_of(path: str) -> str:
    """Return a path without its suffix."""
    return os.path.splitext(path)[0]


def read_text(path: Path) -> str:
    """Return a text file in UTF-8, with or without a byte order mark; invalid bytes become U+FFFD."""
    return path.read_text(encoding="utf-8-sig", errors="replace")


def unlisted_images(files: Files, records: Iterable[Record], problem: str) -> list[Record]:
    """Return a record with this problem for each image without a record, so that none is dropped silently."""
    listed = {record.image for record in records}
    return [Record(path, "", problem) for path in files if is_image(path) and path not in listed]


def read_dogs(folder: Path, files: Files) -> list[Record]:
    """Read Stanford Dogs: in n02089078-black-and-tan_coonhound, the breed follows the first hyphen."""
    records = []
    for path in filter(is_image, files):
        parent = (folder.resolve() / path).parent.name
        if breed := BREED_FOLDER.fullmatch(parent):
            records.append(Record(path, breed[1].replace("_", " ")))
    return records


def read_coco(folder: Path, files: Files) -> list[Record]:
    """Read MS COCO: val2017/000000000139.jpg, with captions in annotations/captions_val2017.json.

    If there are several files of captions, those whose images are present are read. Raises UserError if one
    has another structure.
    """
    path_of = {path.rpartition("/")[2]: path for path in files if is_image(path)}
    records: list[Record] = []
    for path in files:
        if fnmatch(path.rpartition("/")[2], "captions_*.json"):
            try:
                content = json.loads((folder / path).read_bytes())
                # reversed, so that the first caption per image wins
                captions = {row["image_id"]: row["caption"] for row in reversed(content["annotations"])}
                rows = [(row["file_name"], captions.get(row["id"], "")) for row in content["images"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"--data-dir: {path} is not in the layout of MS COCO ({error!r})") from None
            if any(name in path_of for name, _ in rows):
                records += [
                    Record(path_of.get(name, name), caption, None if name in path_of else NO_IMAGE)
                    for name, caption in rows
                ]
    return records and records + unlisted_images(files, records, NO_CAPTION)


def read_img2dataset(folder: Path, files: Files) -> list[Record]:
    """Read img2dataset's folders. Rows that could not be downloaded have a .json and no image.

    A .json without `status` counts as a broken row if an image has its name or if its name is a number; other
    .json files are ignored. A folder without a single readable row is not in this layout.
    """
    image_of = {stem_of(path): path for path in files if is_image(path)}
    records = []
    for path in files:
        if not path.endswith(".json") or path.endswith("_stats.json"):
            continue
        image = image_of.get(path.removesuffix(".json"))
        try:
            row = json.loads((folder / path).read_bytes())
            caption, status = str(row["caption"] or ""), row["status"]
        except (ValueError, KeyError, TypeError):
            if image or Path(path).stem.isdigit():
                records.append(Record(image or path, "", BROKEN_JSON))
            continue
        problem = None if image else NO_IMAGE
        if status != "success":
            problem = NOT_DOWNLOADED
        records.append(Record(image or path, caption, problem))
    if all(record.problem == BROKEN_JSON for record in records):
        return []
    return records + unlisted_images(files, records, "its .json is missing")


def read_imagefolder(folder: Path, files: Files) -> list[Record]:
    """Read Hugging Face's imagefolder. Raises UserError if a metadata file has no column `text`."""
    records: list[Record] = []
    for path in files:
        parent, _, name = path.rpartition("/")
        if name in METADATA_NAMES:
            rows = read_metadata_rows(folder / path)
            columns = sorted({str(column) for row in rows for column in row})
            if rows and "text" not in columns:
                raise UserError(f"--data-dir: {path} has no column `text`, only {', '.join(columns)}")
            for row in rows:
                image = normpath(f"{parent}/{row.get('file_name')}").lstrip("/")
                problem = None if image in files else NO_IMAGE
                if not row.get("file_name"):
                    image, problem = path, "a row without file_name"
                records.append(Record(image, str(row.get("text") or ""), problem))
    return records and records + unlisted_images(files, records, NO_CAPTION)


def read_metadata_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a metadata.csv or .jsonl; a line that cannot be parsed becomes an empty row."""
    text = read_text(path)
    if path.suffix == ".csv":
        csv.field_size_limit(2**31 - 1)
        return list(csv.DictReader(io.StringIO(text, newline="")))
    rows = []
    for line in filter(str.strip, text.split("\n")):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        rows.append(row if isinstance(row, dict) else {})
    return rows


def read_sidecars(folder: Path, files: Files) -> list[Record]:
    """Read images whose captions are in text files of the same name."""
    text_of = {stem_of(path): path for path in files if path.lower().endswith(".txt")}
    records = []
    for path in filter(is_image, files if text_of else ()):
        text = text_of.get(stem_of(path))
        caption = read_text(folder / text) if text else ""
        records.append(Record(path, caption, None if text else "its .txt is missing"))
    return records


LAYOUTS: dict[Callable[[Path, Files], list[Record]], str] = {  # tried in this order
    read_dogs: "Images/<wnid>-<Breed>/*.jpg (Stanford Dogs)",
    read_coco: "captions_*.json (MS COCO)",
    read_imagefolder: "metadata.jsonl or .csv with file_name and text",
    read_img2dataset: "<shard>/<key>.json next to <key>.jpg (img2dataset)",
    read_sidecars: "name.txt next to name.jpg",
}
