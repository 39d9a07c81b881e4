"""Decode a data set once and keep its images on the disk. Training reads them through a memory map.

The cache of a data set is a folder with four files:

    settings.json    what the cache was built from: size, resizing, state of the data folder
    images.uint8     [N, size, size, 3]
    chunks.jsonl     one line per completed chunk of records: captions, what was skipped, what was converted
    manifest.json    written last: the layout, counts, and the names of all that was skipped or converted

A build that was interrupted continues after the last complete line of chunks.jsonl. A cache is built again
from the start when the settings or the data change. Of large files with many images (shards), several are
read at once, each in one pass: a chunk of the first, one of the second, and so on.
"""

import json
import os
import sys
import time
import warnings
from collections.abc import Iterable, Sequence, Sized
from concurrent.futures import Executor, ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from common.cli import check_choice
from common.errors import UserError
from common.files import lock_file, make_folder, read_json, write_json, write_text
from lesson_06_miniglide.image_data.batches import batches
from lesson_06_miniglide.image_data.decoding import ANNOTATIONS, RESIZES, clean_captions, decode
from lesson_06_miniglide.image_data.layouts import detect_layout, fingerprint, list_files
from lesson_06_miniglide.image_data.manifest import check_broken, format_manifest, names_by_note
from lesson_06_miniglide.image_data.records import Caption, Columns, Record, Source

CHUNK_SIZE = 512  # records
VERSION = 2  # of the readers: raise it when the same files give other images or captions


class Chunk(TypedDict):
    """A line of chunks.jsonl."""

    records: int  # how many records were read, with or without an image
    captions: list[Caption]  # of the images
    skipped: list[tuple[str, str]]  # (name, note)
    converted: list[tuple[str, str]]
    part: int  # of the data set: 0, or the number of a shard


def load_cache(
    data_dir: str | Path,
    size: int = 64,
    resize: str = "squish",
    dogs: bool = False,
    limit: int | None = None,
    cache_dir: str | Path | None = None,
    allow_broken: bool = False,
    columns: Columns | None = None,
    crop_to_box: bool = False,
) -> tuple[UInt8[np.ndarray, "n {size} {size} 3"], list[Caption]]:
    """Return the images of a folder as a read-only memory map, and their captions; decode what is missing.

    cache_dir: folder for caches, by default `data_dir`/.cache. columns: what to read of tables. crop_to_box:
    crop each image to its bounding box first (decoding.py). For the rest, see `load_source`. Raises
    UserError, also if images are to be cropped and the folder has no bounding boxes.
    """
    path, caches = Path(data_dir).resolve(), Path(cache_dir or Path(data_dir) / ".cache")
    if caches.resolve() == path:
        raise UserError("--cache-dir is --data-dir; name another folder")
    files = list_files(data_dir, leave_out=caches)
    if crop_to_box and not any(path.startswith(f"{ANNOTATIONS}/") for path in files):
        wanted = f"{ANNOTATIONS}/<class>/<image> of bounding boxes next to Images/"
        raise UserError(f"--crop-to-box: --data-dir {data_dir} has no {wanted}; leave out --crop-to-box")
    state = fingerprint(files)
    if columns and columns != Columns():
        state += f" {columns}"
    source = Source(
        f"--data-dir {data_dir}",
        path.name,
        Path(data_dir),
        state,
        lambda: detect_layout(data_dir, files, dogs, columns),
    )
    # data sets of the same name may share a folder
    suffix = f"_{sha256(os.fsencode(path)).hexdigest()[:8]}" if cache_dir else ""
    suffix = "_box" * crop_to_box + suffix
    more = {"dogs": dogs} | ({"crop_to_box": True} if crop_to_box else {})
    return load_source(source, caches, suffix, size, resize, limit, allow_broken, more)


def load_source(
    source: Source,
    caches: Path,
    suffix: str = "",
    size: int = 64,
    resize: str = "squish",
    limit: int | None = None,
    allow_broken: bool = False,
    more: dict[str, Any] | None = None,
) -> tuple[UInt8[np.ndarray, "n {size} {size} 3"], list[Caption]]:
    """Return the images of a data set as a read-only memory map, and their captions; decode what is missing.

    An image with several captions has a tuple of them. caches: folder for caches. suffix: of the cache's
    name. resize: "squish" to a square, or "crop" the middle. limit: stop after so many readable images. more:
    settings. Raises UserError if there are no images with captions, if all captions are empty, or if more
    than 5 % of the records are broken and `allow_broken` is not set.
    """
    check_choice("--resize", resize, RESIZES)
    settings = {"size": size, "resize": resize} | (more or {})
    settings |= {"limit": limit, "source": source.state, "version": VERSION}
    name = f"{source.name}_{size}_{resize}".replace("/", "_")
    folder = caches / (name + f"_{limit}" * bool(limit) + suffix)
    make_folder(folder, "--cache-dir")
    with lock_file(folder / "lock"):  # one process at a time
        if not prepare(folder, settings):
            layout, parts = source.read()
            try:
                build(folder, source.folder, parts, settings | {"layout": layout})
            except OSError as error:
                raise UserError(f"--cache-dir {folder} cannot be written ({error.strerror})") from None
    check_broken(read_json(folder / "manifest.json"), folder, source.flag, allow_broken)
    captions = [caption for chunk in completed_chunks(folder) for caption in chunk["captions"]]
    if not any(captions):
        raise UserError(f"{source.flag}: the captions of all its {len(captions)} images are empty")
    path, shape = folder / "images.uint8", (len(captions), size, size, 3)
    try:
        return np.memmap(path, np.uint8, "r", shape=shape), captions
    except OSError as error:  # some network file systems
        reason = f"{path} cannot be mapped into memory ({error.strerror})"
        raise UserError(f"{reason}; name a folder on a local disk with --cache-dir") from None


def prepare(folder: Path, settings: dict[str, Any]) -> bool:
    """Return whether the cache is complete; delete what is damaged or belongs to other settings."""
    path, images = folder / "settings.json", folder / "images.uint8"
    try:
        same = json.loads(path.read_text(encoding="utf-8")) == settings
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
    chunks: list[Chunk] = [json.loads(line) for line in lines]
    for chunk in chunks:  # JSON has no tuples
        chunk.setdefault("part", 0)
        chunk["captions"] = [c if isinstance(c, str) else tuple(c) for c in chunk["captions"]]
    return chunks


def build(folder: Path, data_dir: Path, parts: Sequence[Iterable[Record]], settings: dict[str, Any]) -> None:
    """Decode the remaining records, with one thread per core, and write the manifest."""
    started, limit = time.monotonic(), settings["limit"] or sys.maxsize
    sizes = [len(part) for part in parts if isinstance(part, Sized)]  # those of shards are unknown
    total = sum(sizes) if len(sizes) == len(parts) else None
    chunks = completed_chunks(folder)
    done, num_images = sum(c["records"] for c in chunks), sum(len(c["captions"]) for c in chunks)
    write_text(folder / "chunks.jsonl", "".join(map(to_line, chunks)))  # without an incomplete line
    with (
        warnings.catch_warnings(),
        open(folder / "images.uint8", "ab") as image_file,
        open(folder / "chunks.jsonl", "a", encoding="utf-8", errors="backslashreplace") as chunk_file,
        ThreadPoolExecutor(os.cpu_count()) as pool,  # Pillow decodes without holding the interpreter's lock
        tqdm(total=total, initial=done, desc=f"decoding {data_dir.name}", unit="image") as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's about unusual files
        image_file.truncate(num_images * 3 * settings["size"] ** 2)  # without images of an incomplete chunk
        complete = [(c["part"], c["records"]) for c in chunks]
        for part, batch in batches(parts, complete, CHUNK_SIZE) if num_images < limit else ():
            chunk, pixels = decode_chunk(pool, data_dir, batch, part, settings, limit - num_images)
            image_file.writelines(pixels)
            image_file.flush()  # before the line that promises these images
            chunk_file.write(to_line(chunk))
            chunk_file.flush()
            chunks.append(chunk)
            num_images += len(pixels)
            bar.update(chunk["records"])
            if num_images >= limit:
                break
    manifest = settings | {"records": sum(c["records"] for c in chunks), "images": num_images}
    manifest["minutes"] = (time.monotonic() - started) / 60
    manifest["skipped"] = names_by_note(pair for c in chunks for pair in c["skipped"])
    manifest["converted"] = names_by_note(pair for c in chunks for pair in c["converted"])
    write_json(folder / "manifest.json", manifest, ensure_ascii=False)
    print(format_manifest(manifest))


def decode_chunk(
    pool: Executor, data_dir: Path, records: Sequence[Record], part: int, settings: dict[str, Any], limit: int
) -> tuple[Chunk, list[bytes]]:
    """Decode records until there are `limit` images; return their chunk and the bytes of each image."""
    size, resize, crop_to_box = settings["size"], settings["resize"], settings.get("crop_to_box", False)
    decoded = pool.map(lambda record: decode(data_dir, record, size, resize, crop_to_box), records)
    chunk: Chunk = {"records": 0, "captions": [], "skipped": [], "converted": [], "part": part}
    pixels: list[bytes] = []
    for record, (image, notes) in zip(records, decoded):
        if len(pixels) == limit:
            break
        chunk["records"] += 1
        if image is None:
            chunk["skipped"] += [(record.image, note) for note in notes]
            continue
        caption, caption_notes = clean_captions(record.caption)
        pixels.append(image)
        chunk["captions"].append(caption)
        chunk["converted"] += [(record.image, note) for note in notes + caption_notes]
    return chunk, pixels


def to_line(chunk: Chunk) -> str:
    """Return a chunk as a line of chunks.jsonl, without the part if it is 0."""
    line = {key: value for key, value in chunk.items() if (key, value) != ("part", 0)}
    return json.dumps(line, ensure_ascii=False) + "\n"
