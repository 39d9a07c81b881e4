"""Decode a data set once and keep its images on the disk. Training reads them through a memory map.

The cache of a data set is a folder with four files:

    settings.json    what the cache was built from: size, resizing, state of the data folder
    images.uint8     [N, size, size, 3]
    chunks.jsonl     one line per completed chunk of records: captions, what was skipped, what was converted
    manifest.json    written last: counts, and the names of all that was skipped or converted

A build that was interrupted continues after the last complete line of chunks.jsonl. A cache is built again
from the start when the settings or the data change.
"""

import json
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from common.cli import check_choice
from common.errors import UserError
from common.files import make_folder, read_json, write_json, write_text
from lesson_06_miniglide.image_data.decoding import RESIZES, clean_caption, decode
from lesson_06_miniglide.image_data.layouts import Files, Record, fingerprint, list_files, read_records
from lesson_06_miniglide.image_data.manifest import check_broken, format_manifest, names_by_note

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

CHUNK_SIZE = 512  # records


class Chunk(TypedDict):
    """A line of chunks.jsonl."""

    records: int  # how many records were read, with or without an image
    captions: list[str]  # of the images
    skipped: list[tuple[str, str]]  # (name, note)
    converted: list[tuple[str, str]]


def load_cache(
    data_dir: str | Path,
    size: int = 64,
    resize: str = "squish",
    dogs: bool = False,
    limit: int | None = None,
    cache_dir: str | Path | None = None,
    allow_broken: bool = False,
) -> tuple[UInt8[np.ndarray, "n {size} {size} 3"], list[str]]:
    """Return the images of a data set as a read-only memory map, and their captions; decode what is missing.

    resize: "squish" to a square, or "crop" the middle. limit: stop after so many readable images. cache_dir:
    folder for caches, by default `data_dir`/.cache. Raises UserError if there are no images with captions, or
    if more than 5 % of the records are broken and `allow_broken` is not set.
    """
    check_choice("--resize", resize, RESIZES)
    source, caches = Path(data_dir).resolve(), Path(cache_dir or Path(data_dir) / ".cache")
    files = exclude_caches(list_files(data_dir), source, caches.resolve())
    settings = {"size": size, "resize": resize, "dogs": dogs, "limit": limit, "source": fingerprint(files)}
    folder = caches / (f"{source.name}_{size}_{resize}" + f"_{limit}" * bool(limit))
    if cache_dir:  # data sets of the same name may share it
        folder = folder.with_name(f"{folder.name}_{sha256(str(source).encode()).hexdigest()[:8]}")
    make_folder(folder, "--cache-dir")
    with file_lock(folder):
        if not prepare(folder, settings):
            records = read_records(data_dir, files, dogs)
            try:
                build(folder, Path(data_dir), records, settings)
            except OSError as error:
                raise UserError(f"--cache-dir {folder} cannot be written ({error.strerror})") from None
    check_broken(read_json(folder / "manifest.json"), folder, data_dir, allow_broken)
    captions = [caption for chunk in completed_chunks(folder) for caption in chunk["captions"]]
    return np.memmap(folder / "images.uint8", np.uint8, "r", shape=(len(captions), size, size, 3)), captions


def exclude_caches(files: Files, source: Path, caches: Path) -> Files:
    """Return the files of a data folder without those in a folder of caches inside it.

    Raises UserError if the two folders are the same.
    """
    if caches == source:
        raise UserError("--cache-dir is --data-dir; name another folder")
    prefix = f"{os.path.relpath(caches, source)}/".replace(os.sep, "/")
    return {path: state for path, state in files.items() if not path.startswith(prefix)}


@contextmanager
def file_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a cache; the system releases the lock however the process ends."""
    with open(folder / "lock", "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether the cache is complete; delete what is damaged or belongs to other settings."""
    path, images = folder / "settings.json", folder / "images.uint8"
    try:
        same = json.loads(path.read_text()) == settings
        num_images = sum(len(chunk["captions"]) for chunk in completed_chunks(folder))
        expected_size = 3 * settings["size"] ** 2 * num_images
        intact = not expected_size or images.stat().st_size >= expected_size
    except (OSError, ValueError):
        same = intact = False
    if not (same and intact):
        for name in ("manifest.json", "chunks.jsonl", "images.uint8"):
            (folder / name).unlink(missing_ok=True)
        write_json(path, settings)
    return (folder / "manifest.json").exists()


def completed_chunks(folder: Path) -> list[Chunk]:
    """Return the chunks that are complete; the line that an interrupted build was writing is left out."""
    path = folder / "chunks.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def build(folder: Path, data_dir: Path, records: Sequence[Record], settings: dict[str, Any]) -> None:
    """Decode the remaining records, with one thread per core, and write the manifest."""
    started, limit = time.monotonic(), settings["limit"] or len(records)
    chunks = completed_chunks(folder)
    done, num_images = sum(c["records"] for c in chunks), sum(len(c["captions"]) for c in chunks)
    write_text(folder / "chunks.jsonl", "".join(map(to_line, chunks)))  # without an incomplete line
    with (
        warnings.catch_warnings(),
        open(folder / "images.uint8", "ab") as image_file,
        open(folder / "chunks.jsonl", "a", encoding="utf-8") as chunk_file,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes without holding the interpreter's lock
        tqdm(total=len(records), initial=done, desc=f"decoding {data_dir.name}", unit="image") as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's about unusual files
        image_file.truncate(num_images * 3 * settings["size"] ** 2)  # without images of an incomplete chunk
        for start in range(done, len(records), CHUNK_SIZE):
            if num_images >= limit:
                break
            batch = records[start : start + CHUNK_SIZE]
            chunk, pixels = decode_chunk(pool, data_dir, batch, settings, limit - num_images)
            image_file.writelines(pixels)
            image_file.flush()  # before the line that promises these images
            chunk_file.write(to_line(chunk))
            chunk_file.flush()
            chunks.append(chunk)
            num_images += len(pixels)
            bar.update(chunk["records"])
    manifest = settings | {"records": sum(c["records"] for c in chunks), "images": num_images}
    manifest["minutes"] = (time.monotonic() - started) / 60
    manifest["skipped"] = names_by_note(pair for c in chunks for pair in c["skipped"])
    manifest["converted"] = names_by_note(pair for c in chunks for pair in c["converted"])
    write_json(folder / "manifest.json", manifest, ensure_ascii=False)
    print(format_manifest(manifest))


def decode_chunk(
    pool: Executor, data_dir: Path, records: Sequence[Record], settings: dict[str, Any], limit: int
) -> tuple[Chunk, list[bytes]]:
    """Decode records until there are `limit` images; return their chunk and the bytes of each image."""
    size, resize = settings["size"], settings["resize"]
    decoded = pool.map(lambda record: decode(data_dir, record, size, resize), records)
    chunk: Chunk = {"records": 0, "captions": [], "skipped": [], "converted": []}
    pixels: list[bytes] = []
    for record, (image, notes) in zip(records, decoded):
        if len(pixels) == limit:
            break
        chunk["records"] += 1
        if image is None:
            chunk["skipped"] += [(record.image, note) for note in notes]
            continue
        caption, caption_notes = clean_caption(record.caption)
        pixels.append(image)
        chunk["captions"].append(caption)
        chunk["converted"] += [(record.image, note) for note in notes + caption_notes]
    return chunk, pixels


def to_line(chunk: Chunk) -> str:
    """Return a chunk as a line of chunks.jsonl."""
    return json.dumps(chunk, ensure_ascii=False) + "\n"
