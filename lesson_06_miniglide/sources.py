"""Where images and their captions come from: five layouts of folders, each read into the same records.

    img2dataset   <shard>/<key>.jpg beside <key>.json with caption, status, key       (SBU captions)
    dogs          Images/<wnid>-<Breed>/*.jpg, the breed is the caption               (Stanford Dogs)
    coco          captions_*.json beside the images, each image's first caption       (MS COCO)
    imagefolder   metadata.jsonl or metadata.csv with file_name and text              (Hugging Face)
    sidecars      name.jpg beside name.txt, which holds the caption

No image is opened here.
"""

import csv
import json
import os
import re
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

from common.command import UserError

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
METADATA = ("metadata.jsonl", "metadata.csv")
NOT_DOWNLOADED = "never downloaded"  # by img2dataset; a link that is dead is no damage
BREED = re.compile(r"n\d{8}-(.+)")


class Record(NamedTuple):
    """An image and its caption, as the data set's files state them; nothing has been opened yet."""

    image: str  # path below the data set's folder
    caption: str
    problem: str | None = None  # why there can be no image


def read_records(folder, files, dogs=False):
    """All records of a data set, in an order that depends on the files' names alone.

    files: `list_files` of the folder. dogs: take it as Stanford Dogs, whatever it looks like. Raises
    UserError if the folder is in none of the layouts.
    """
    for read in [read_dogs] if dogs else LAYOUTS:
        if records := read(folder, files):
            return records
    wanted = LAYOUTS[read_dogs] if dogs else "; ".join(LAYOUTS.values())
    raise UserError(f"--data-dir {folder} holds no images with captions; looked for {wanted}")


def list_files(folder):
    """path below `folder` -> (bytes, time of change), of all files in it that are not hidden."""
    if not Path(folder).is_dir():
        raise UserError(f"--data-dir {folder} is not a folder")
    found, left = {}, [""]
    while left:
        inside = left.pop()
        with os.scandir(Path(folder) / inside) as entries:
            for entry in entries:
                path = f"{inside}{entry.name}"
                if entry.name.startswith("."):
                    continue
                if entry.is_dir():
                    left.append(f"{path}/")
                else:
                    stat = entry.stat()
                    found[path] = (stat.st_size, stat.st_mtime_ns)
    return dict(sorted(found.items()))


def fingerprint(files):
    """A short name for the state of a folder: it changes when a file comes, goes or is written."""
    digest = sha256()
    for path, (size, changed) in files.items():
        digest.update(f"{path}\0{size}\0{changed}\n".encode())
    return digest.hexdigest()[:16]


def read_dogs(folder, files):
    """n02089078-black-and-tan_coonhound: the caption is all that follows the first hyphen."""
    records = []
    for path in files:
        *_, parent, name = ["", "", *path.split("/")]
        if (breed := BREED.fullmatch(parent)) and name.lower().endswith(IMAGE_ENDINGS):
            records.append(Record(path, breed[1].replace("_", " ")))
    return records


def read_coco(folder, files):
    """val2017/000000000139.jpg, and its captions in annotations/captions_val2017.json or elsewhere beside."""
    place = {path.rpartition("/")[2]: path for path in files if path.lower().endswith(IMAGE_ENDINGS)}
    records = []
    for path in files:
        if fnmatch(path.rpartition("/")[2], "captions_*.json"):
            try:
                content = json.loads((Path(folder) / path).read_bytes())
                captions = {row["image_id"]: row["caption"] for row in reversed(content["annotations"])}
                for row in content["images"]:
                    name, caption = row["file_name"], captions.get(row["id"], "")
                    problem = None if name in place else "its image is missing"
                    records.append(Record(place.get(name, name), caption, problem))
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"--data-dir: {path} is not in the layout of MS COCO ({error!r})") from None
    return records


def read_img2dataset(folder, files):
    """Rows that could not be downloaded have a .json of their own and no image."""
    records = []
    for path in files:
        if not path.endswith(".json") or path.endswith("_stats.json"):
            continue
        image = next((p for ending in IMAGE_ENDINGS if (p := path[: -len(".json")] + ending) in files), None)
        try:
            row = json.loads((Path(folder) / path).read_bytes())
            caption, status = str(row["caption"] or ""), row["status"]
        except (ValueError, KeyError, TypeError):
            records.append(Record(image or path, "", "its .json is broken"))
            continue
        problem = None if image else "its image is missing"
        if status != "success":
            problem = NOT_DOWNLOADED
        records.append(Record(image or path, caption, problem))
    return records


def read_imagefolder(folder, files):
    records = []
    for path in files:
        inside, _, name = path.rpartition("/")
        if name in METADATA:
            for row in read_rows(Path(folder) / path):
                if not row.get("file_name"):
                    records.append(Record(path, "", "a row without file_name"))
                    continue
                image = f"{inside}/{row['file_name']}".lstrip("/")
                problem = None if image in files else "its image is missing"
                records.append(Record(image, str(row.get("text") or ""), problem))
    return records


def read_rows(path):
    """The rows of a metadata file as dicts; a line that cannot be read is a dict with nothing in it."""
    text = path.read_text(encoding="utf-8", errors="replace")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    rows = []
    for line in filter(str.strip, text.splitlines()):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        rows.append(row if isinstance(row, dict) else {})
    return rows


def read_sidecars(folder, files):
    if not any(path.endswith(".txt") for path in files):
        return []
    records = []
    for path in files:
        stem, ending = os.path.splitext(path)
        if ending.lower() in IMAGE_ENDINGS:
            caption, problem = "", "its .txt is missing"
            if f"{stem}.txt" in files:
                caption = (Path(folder) / f"{stem}.txt").read_text(encoding="utf-8", errors="replace")
                problem = None
            records.append(Record(path, caption, problem))
    return records


LAYOUTS = {  # looked for in this order
    read_dogs: "Images/<wnid>-<Breed>/*.jpg (Stanford Dogs)",
    read_coco: "captions_*.json (MS COCO)",
    read_imagefolder: "metadata.jsonl or .csv with file_name and text",
    read_img2dataset: "<shard>/<key>.json beside <key>.jpg (img2dataset)",
    read_sidecars: "name.txt beside name.jpg",
}
