"""Where images and their captions come from: five layouts of folders, each read into the same records.

    img2dataset   <shard>/<key>.jpg beside <key>.json with caption, status, key       (SBU captions)
    dogs          Images/<wnid>-<Breed>/*.jpg, the breed is the caption               (Stanford Dogs)
    coco          captions_*.json beside the images, each image's first caption       (MS COCO)
    imagefolder   metadata.jsonl or metadata.csv with file_name and text              (Hugging Face)
    sidecars      name.jpg beside name.txt, which holds the caption

No image is opened here.
"""

import csv
import io
import json
import os
import re
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from posixpath import normpath
from typing import NamedTuple

from common.command import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
NOT_DOWNLOADED = "never downloaded"  # by img2dataset
WITHOUT_CAPTION = "no caption is for it"
NO_DAMAGE = (NOT_DOWNLOADED, WITHOUT_CAPTION)  # a link that is dead, an image of another list
BROKEN_JSON = "its .json is broken"
BREED = re.compile(r"n\d{8}-(.+)")


class Record(NamedTuple):
    """An image and its caption, as the data set's files state them; nothing has been opened yet."""

    image: str  # path below the data set's folder
    caption: str
    problem: str | None = None  # why there can be no image


def read_records(folder, files, dogs=False):
    """All records of a data set, in an order that depends on the files' names alone.

    files: `list_files` of the folder. dogs: take it as Stanford Dogs, whatever it looks like. Raises
    UserError if the folder is in none of the layouts, or if a file with captions cannot be read.
    """
    for read in [read_dogs] if dogs else LAYOUTS:
        try:
            if records := read(Path(folder), files):
                return records
        except OSError as error:
            raise UserError(f"--data-dir: {error.filename} cannot be read ({error.strerror})") from None
    wanted = LAYOUTS[read_dogs] if dogs else "; ".join(LAYOUTS.values())
    raise UserError(f"--data-dir {folder} holds no images with captions; looked for {wanted}")


def list_files(folder):
    """path below `folder` -> (bytes, time of change), of all its files; hidden ones and dead links are not.

    Links to folders are not followed. Raises UserError if there is no such folder, or it cannot be read.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--data-dir {folder} is not a folder")
    found, left = {}, [""]
    try:
        while left:
            inside = left.pop()
            with os.scandir(Path(folder) / inside) as entries:
                for entry in entries:
                    path = f"{inside}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_dir(follow_symlinks=False):
                        left.append(f"{path}/")
                    elif entry.is_file():
                        stat = entry.stat()
                        found[path] = (stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise UserError(f"--data-dir: {error.filename} cannot be read ({error.strerror})") from None
    return dict(sorted(found.items()))


def fingerprint(files):
    """A short name for the state of a folder: it changes when a file comes, goes or is written."""
    digest = sha256()
    for path, (size, changed) in files.items():
        digest.update(f"{path}\0{size}\0{changed}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()[:16]


def is_image(path):
    return path.lower().endswith(IMAGE_ENDINGS)


def by_stem(files, wanted):
    """path without its ending -> the path, of the files that are `wanted`."""
    return {os.path.splitext(path)[0]: path for path in files if wanted(path)}


def read_text(path):
    """A text file in UTF-8, with or without a byte order mark; bytes that are no UTF-8 become marks."""
    return path.read_text(encoding="utf-8-sig", errors="replace")


def read_dogs(folder, files):
    """n02089078-black-and-tan_coonhound: the caption is all that follows the first hyphen."""
    records = []
    for path in filter(is_image, files):
        parent = (folder.resolve() / path).parent.name
        if breed := BREED.fullmatch(parent):
            records.append(Record(path, breed[1].replace("_", " ")))
    return records


def read_coco(folder, files):
    """val2017/000000000139.jpg, its captions in annotations/captions_val2017.json or elsewhere beside it.

    Of several files of captions, those are read whose images are there.
    """
    place = {path.rpartition("/")[2]: path for path in files if is_image(path)}
    records = []
    for path in files:
        if fnmatch(path.rpartition("/")[2], "captions_*.json"):
            try:
                content = json.loads((folder / path).read_bytes())
                captions = {row["image_id"]: row["caption"] for row in reversed(content["annotations"])}
                rows = [(row["file_name"], captions.get(row["id"], "")) for row in content["images"]]
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"--data-dir: {path} is not in the layout of MS COCO ({error!r})") from None
            if any(name in place for name, _ in rows):
                missing = "its image is missing"
                records += [Record(place.get(n, n), c, None if n in place else missing) for n, c in rows]
    return records and records + others(files, records, WITHOUT_CAPTION)


def others(files, records, problem):
    """A record of each image that no record is of: nothing is left out in silence."""
    known = {record.image for record in records}
    return [Record(path, "", problem) for path in files if is_image(path) and path not in known]


def read_img2dataset(folder, files):
    """Rows that could not be downloaded have a .json of their own and no image.

    A .json that is neither a row (with `status`) nor beside an image nor named by a key is something else;
    where there is no row at all, all are.
    """
    images, records = by_stem(files, is_image), []
    for path in files:
        if not path.endswith(".json") or path.endswith("_stats.json"):
            continue
        image = images.get(path.removesuffix(".json"))
        try:
            row = json.loads((folder / path).read_bytes())
            caption, status = str(row["caption"] or ""), row["status"]
        except (ValueError, KeyError, TypeError):
            if image or Path(path).stem.isdigit():
                records.append(Record(image or path, "", BROKEN_JSON))
            continue
        problem = None if image else "its image is missing"
        if status != "success":
            problem = NOT_DOWNLOADED
        records.append(Record(image or path, caption, problem))
    if all(record.problem == BROKEN_JSON for record in records):
        return []
    return records + others(files, records, "its .json is missing")


def read_imagefolder(folder, files):
    """Raises UserError if a metadata file has no column `text`."""
    records = []
    for path in files:
        inside, _, name = path.rpartition("/")
        if name in METADATA:
            rows = read_rows(folder / path)
            columns = sorted({str(column) for row in rows for column in row})
            if rows and "text" not in columns:
                raise UserError(f"--data-dir: {path} has no column `text`, only {', '.join(columns)}")
            for row in rows:
                image = normpath(f"{inside}/{row.get('file_name')}").lstrip("/")
                problem = None if image in files else "its image is missing"
                if not row.get("file_name"):
                    image, problem = path, "a row without file_name"
                records.append(Record(image, str(row.get("text") or ""), problem))
    return records and records + others(files, records, WITHOUT_CAPTION)


def read_rows(path):
    """The rows of a metadata file as dicts; a line that cannot be read is a dict with nothing in it."""
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


def read_sidecars(folder, files):
    texts = by_stem(files, lambda path: path.lower().endswith(".txt"))
    records = []
    for path in filter(is_image, files if texts else ()):
        text = texts.get(os.path.splitext(path)[0])
        caption = read_text(folder / text) if text else ""
        records.append(Record(path, caption, None if text else "its .txt is missing"))
    return records


LAYOUTS = {  # looked for in this order
    read_dogs: "Images/<wnid>-<Breed>/*.jpg (Stanford Dogs)",
    read_coco: "captions_*.json (MS COCO)",
    read_imagefolder: "metadata.jsonl or .csv with file_name and text",
    read_img2dataset: "<shard>/<key>.json beside <key>.jpg (img2dataset)",
    read_sidecars: "name.txt beside name.jpg",
}
