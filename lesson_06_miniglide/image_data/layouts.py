"""List the files of a data folder and find out in which layout they are. readers.py has a reader for each.

    dogs          Images/<wnid>-<Breed>/*.jpg, the breed is the caption              (Stanford Dogs)
    coco          captions_*.json with the captions of the images of a split         (MS COCO)
    imagefolder   metadata.jsonl or metadata.csv with file_name and text             (Hugging Face)
    flickr        captions.txt, a table with the columns image and caption           (Flickr8k)
    img2dataset   <shard>/<key>.jpg and <key>.json with caption, status and key      (SBU captions)
    sidecars      name.jpg and name.txt, which has one caption per line
    saved         dataset_dict.json or state.json, of save_to_disk                   (Hugging Face; hub.py)
    shards        00000.tar with <key>.jpg, <key>.txt, <key>.json                    (WebDataset; shards.py)
    parquet       columns with the images' bytes and the captions                    (parquet.py)

In all but the first, an image can have several captions. These modules open no image; decoding.py does.
"""

import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from hashlib import sha256
from pathlib import Path

from common.errors import UserError
from lesson_06_miniglide.image_data import readers
from lesson_06_miniglide.image_data import records as problem
from lesson_06_miniglide.image_data.hub import read_saved
from lesson_06_miniglide.image_data.parquet import read_parquet
from lesson_06_miniglide.image_data.readers import Found, is_captions
from lesson_06_miniglide.image_data.records import (
    NOT_A_FILE,
    Columns,
    Files,
    Record,
    is_image,
    merge_captions,
)
from lesson_06_miniglide.image_data.shards import is_shard, read_shards

Reader = Callable[[Path, Files], Found | None]
LAYOUTS: dict[Reader, str] = {  # tried in this order, then those of `detect_layout`
    readers.read_dogs: "Images/<wnid>-<Breed>/*.jpg (Stanford Dogs)",
    readers.read_coco: "captions_*.json (MS COCO)",
    readers.read_imagefolder: "metadata.jsonl or .csv with file_name and text",
    readers.read_flickr: "captions.txt with image,caption (Flickr8k)",
    readers.read_img2dataset: "<shard>/<key>.json next to <key>.jpg (img2dataset)",
    readers.read_sidecars: "name.txt next to name.jpg",
}


def read_records(folder: str | Path, files: Files, dogs: bool = False) -> list[Record]:
    """Return all records of a data set; see `detect_layout`."""
    return [record for part in detect_layout(folder, files, dogs)[1] for record in part]


def detect_layout(
    folder: str | Path, files: Files, dogs: bool = False, columns: Columns | None = None
) -> tuple[str, Sequence[Iterable[Record]]]:
    """Return the layout with the file that showed it, and all records, in an order set by the files' names.

    The records are in parts: a list, and one stream for every large file with images.

    Every file with the name of an image or of captions is part of a record, if only of one with a problem.
    files: from `list_files`. dogs: read the folder as Stanford Dogs instead of detecting its layout. columns:
    what to read of tables. Raises UserError if the folder has none of the layouts, or if a file with captions
    cannot be read.
    """
    columns = columns or Columns()
    layouts: dict[Reader, str] = LAYOUTS | {
        partial(read_saved, columns=columns): "save_to_disk's dataset_dict.json or state.json (Hugging Face)",
        read_shards: "00000.tar with <key>.jpg and <key>.txt or .json (WebDataset)",
        partial(read_parquet, columns=columns): ".parquet with images (img2dataset, Hugging Face)",
    }
    layouts = {readers.read_dogs: LAYOUTS[readers.read_dogs]} if dogs else layouts
    for read, layout in layouts.items():
        try:
            found = read(Path(folder), files)
        except OSError as error:
            raise UserError(f"--data-dir: {error.filename} cannot be read ({error.strerror})") from None
        if found and not columns.are_usual() and not isinstance(read, partial):
            reason = "--image-column, --caption-column and --split do not apply to it"
            raise UserError(f"--data-dir {folder} is in the layout {layout}; {reason}")
        if found:
            records = complete(found, files)
            parts = [*([records] if records else []), *found.streams]
            return f"{layout}, shown by {found.decided_by}", parts
    wanted = "; ".join(layouts.values())
    raise UserError(f"--data-dir {folder} holds no images with captions; looked for {wanted}")


def complete(found: Found, files: Files) -> list[Record]:
    """Return one record per image with all its captions, and one for each file that is not used."""
    listed = {record.image for record in found.records} | found.read
    unlisted = [Record(path, "", found.unlisted) for path in files if is_image(path) and path not in listed]
    records = [with_problem(record, files) for record in found.records + unlisted]
    listed |= {record.image for record in unlisted}
    rest = [path for path in files if path not in listed]
    rest = [path for path in rest if has_data(path, files) or files[path] == NOT_A_FILE]
    return merge_captions(records + [Record(path, "", why_unused(path, found, files)) for path in rest])


def why_unused(path: str, found: Found, files: Files) -> str:
    """Return why a file that is part of no record is not used."""
    if files[path] == NOT_A_FILE:
        return problem.DEAD_LINK
    beside_images = found.unlisted == problem.NO_TEXT and is_captions(path)
    return problem.NOT_A_CAPTION if beside_images else problem.NOT_READ


def has_data(path: str, files: Files) -> bool:
    """Return whether a file has the name of captions, a shard, or a table other than img2dataset's log."""
    if path.endswith(".parquet"):
        return f"{path.removesuffix('.parquet')}_stats.json" not in files
    return is_captions(path) or is_shard(path)


def with_problem(record: Record, files: Files) -> Record:
    """Return a record of a dead link or of an unknown format with this problem."""
    if files.get(record.image) == NOT_A_FILE:
        return record._replace(problem=problem.DEAD_LINK if record.problem else problem.NO_IMAGE)
    if not record.problem and record.image.lower().endswith(problem.UNREAD_SUFFIXES):
        return record._replace(problem=problem.UNKNOWN_FORMAT)
    return record


def list_files(folder: str | Path, leave_out: Path | None = None) -> dict[str, tuple[int, int]]:
    """Return path below `folder` -> (bytes, modification time in ns) of all files, sorted by path.

    Links to folders are followed, unless they lead back up. Dead links are listed as NOT_A_FILE. Hidden files
    and the folder `leave_out` are left out. Raises UserError if the folder does not exist or cannot be read.
    """
    if not Path(folder).is_dir():
        raise UserError(f"--data-dir {folder} is not a folder")
    found: dict[str, tuple[int, int]] = {}
    try:
        excluded = {identity(leave_out)} if leave_out and leave_out.is_dir() else set()
        pending = [("", excluded)]
        while pending:
            parent, above = pending.pop()
            this = identity(Path(folder) / parent)
            if this in above:
                continue
            with os.scandir(Path(folder) / parent) as entries:
                for entry in entries:
                    path = f"{parent}{entry.name}"
                    if entry.name.startswith("."):
                        continue
                    if entry.is_symlink() and not os.path.exists(entry.path):  # to nothing, or to itself
                        found[path] = NOT_A_FILE
                    elif entry.is_dir():
                        pending.append((f"{path}/", above | {this}))
                    elif entry.is_file():
                        stat = entry.stat()
                        found[path] = (stat.st_size, stat.st_mtime_ns)
                    else:
                        found[path] = NOT_A_FILE
    except OSError as error:
        raise UserError(f"--data-dir: {error.filename} cannot be read ({error.strerror})") from None
    return dict(sorted(found.items()))


def identity(folder: Path) -> tuple[int, int]:
    """Return what tells a folder from all others, however many links lead to it."""
    stat = os.stat(folder)
    return stat.st_dev, stat.st_ino


def fingerprint(files: Files) -> str:
    """Return a hash of a folder's state, which changes when a file is added, removed or written."""
    digest = sha256()
    for path, (size, modified) in files.items():
        digest.update(os.fsencode(f"{path}\0{size}\0{modified}\n"))
    return digest.hexdigest()[:16]
