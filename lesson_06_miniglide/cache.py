"""Images decoded once and kept on the disk as a memory map, which training reads as if it were in memory.

A data set becomes a folder of four files:

    settings.json    what the rest belongs to: size, way of resizing, state of the source
    images.uint8     [N, size, size, 3]
    chunks.jsonl     a line for each chunk of records that is done: captions, what was skipped, what converted
    manifest.json    written last: counts, and by name all that was skipped or converted

A build that is killed goes on behind its last whole line of chunks.jsonl. When the settings or the source
change, it starts anew.
"""

import json
import os
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

from common.command import UserError, check_choice
from common.runs import make_folder, read_json, write_atomically, write_json
from lesson_06_miniglide.sources import NO_DAMAGE, fingerprint, list_files, read_records

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

CHUNK = 512  # records
LONG_CAPTION = 1000  # characters
TOLERATED = 0.05  # share of the records that may be broken
BICUBIC = Image.Resampling.BICUBIC
RESIZE_FILTER = "bicubic, of JPEGs decoded at no less than twice the size"
RESIZES = {
    "squish": lambda image, size: image.resize((size, size), BICUBIC),
    "crop": lambda image, size: ImageOps.fit(image, (size, size), BICUBIC),
}
UNUSUAL = {"L": "gray", "1": "black and white", "P": "palette", "CMYK": "CMYK", "I;16": "16 bits"}
ORIENTATION = 0x0112  # of the EXIF tags


def load_cache(
    data_dir, size=64, resize="squish", dogs=False, limit=None, cache_dir=None, allow_broken=False
):
    """(images uint8 [N, size, size, 3] on the disk, captions [N]) of a data set, decoded now or before.

    resize: "squish" to a square, or "crop" the middle. limit: take so many images, the first that are whole.
    cache_dir: where the cache goes; default `data_dir`/.cache. Raises UserError if nothing is found, or if
    more than 5 % of it is broken and `allow_broken` is not set.
    """
    check_choice("--resize", resize, RESIZES)
    source, caches = Path(data_dir).resolve(), Path(cache_dir or Path(data_dir) / ".cache")
    files = without(list_files(data_dir), source, caches.resolve())
    settings = {"size": size, "resize": resize, "dogs": dogs, "limit": limit, "source": fingerprint(files)}
    folder = caches / (f"{source.name}_{size}_{resize}" + f"_{limit}" * bool(limit))
    if cache_dir:  # where data sets of the same name may meet
        folder = folder.with_name(f"{folder.name}_{sha256(str(source).encode()).hexdigest()[:8]}")
    make_folder(folder, "--cache-dir")
    with alone(folder):
        if not begin(folder, settings):
            records = read_records(data_dir, files, dogs)
            try:
                build(folder, Path(data_dir), records, settings)
            except OSError as error:
                raise UserError(f"--cache-dir {folder} cannot be written ({error.strerror})") from None
    manifest = read_json(folder / "manifest.json")
    check_broken(manifest, folder, data_dir, allow_broken)
    captions = [caption for chunk in finished(folder) for caption in chunk["captions"]]
    return np.memmap(folder / "images.uint8", np.uint8, "r", shape=(len(captions), size, size, 3)), captions


def without(files, source, caches):
    """The files of a source but for those of a folder of caches in it. Raises UserError if that is all."""
    if caches == source:
        raise UserError("--cache-dir is --data-dir; name another folder")
    inside = f"{os.path.relpath(caches, source)}/".replace(os.sep, "/")
    return {path: state for path, state in files.items() if not path.startswith(inside)}


@contextmanager
def alone(folder):
    """Other programs that want this cache wait; the lock ends with the program, however that ends."""
    with open(folder / "lock", "w") as file:
        if fcntl:
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def begin(folder, settings):
    """Whether the cache is complete. What belongs to other settings, or is damaged, is taken away."""
    path, images = folder / "settings.json", folder / "images.uint8"
    try:
        same = json.loads(path.read_text()) == settings
        expected = 3 * settings["size"] ** 2 * sum(len(chunk["captions"]) for chunk in finished(folder))
        whole = not expected or images.stat().st_size >= expected
    except (OSError, ValueError):
        same = whole = False
    if not (same and whole):
        for name in ("manifest.json", "chunks.jsonl", "images.uint8"):
            (folder / name).unlink(missing_ok=True)
        write_json(path, settings)
    return (folder / "manifest.json").exists()


def finished(folder):
    """The chunks that are done; a line that was being written when the build was killed is not."""
    path = folder / "chunks.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def build(folder, data_dir, records, settings):
    """Decode what is not decoded yet, in a thread a core (Pillow works outside the interpreter's lock)."""
    started, limit = time.monotonic(), settings["limit"] or len(records)
    chunks = finished(folder)
    done, count = sum(c["records"] for c in chunks), sum(len(c["captions"]) for c in chunks)
    text = "".join(map(as_line, chunks))
    write_atomically(folder / "chunks.jsonl", lambda part: part.write_text(text, encoding="utf-8"))
    with (
        warnings.catch_warnings(),
        open(folder / "images.uint8", "ab") as images,
        open(folder / "chunks.jsonl", "a", encoding="utf-8") as journal,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        tqdm(total=len(records), initial=done, desc=f"decoding {data_dir.name}", unit="image") as bar,
    ):
        warnings.simplefilter("ignore")  # Pillow's, of odd files
        images.truncate(count * 3 * settings["size"] ** 2)  # off with what no line speaks of
        for start in range(done, len(records), CHUNK):
            if count >= limit:
                break
            batch = records[start : start + CHUNK]
            decoded = pool.map(lambda record: decode(data_dir, record, settings), batch)
            chunk = {"records": 0, "captions": [], "skipped": [], "converted": []}
            for record, (image, notes) in zip(batch, decoded):
                if count + len(chunk["captions"]) == limit:
                    break
                chunk["records"] += 1
                caption, caption_notes = tidy(record.caption)
                if image is None:
                    chunk["skipped"] += [(record.image, note) for note in notes]
                    continue
                images.write(image)
                chunk["captions"].append(caption)
                chunk["converted"] += [(record.image, note) for note in notes + caption_notes]
            images.flush()  # before the line that speaks of them
            journal.write(as_line(chunk))
            journal.flush()
            chunks.append(chunk)
            count += len(chunk["captions"])
            bar.update(chunk["records"])
    counts = {"records": sum(c["records"] for c in chunks), "images": count}
    counts["minutes"] = (time.monotonic() - started) / 60
    names = {kind: by_note(pair for c in chunks for pair in c[kind]) for kind in ("skipped", "converted")}
    write_json(folder / "manifest.json", settings | counts | names, ensure_ascii=False)
    print(in_words(counts | names))


def as_line(chunk):
    return json.dumps(chunk, ensure_ascii=False) + "\n"


def decode(data_dir, record, settings):
    """(RGB bytes of the resized image, what was unusual about it), or (None, why there is no image)."""
    if record.problem:
        return None, [record.problem]
    try:
        with Image.open(data_dir / record.image) as image:
            # a large JPEG is decoded at a half, a quarter or an eighth of its size
            image.draft(None, (2 * settings["size"], 2 * settings["size"]))
            notes = [UNUSUAL[image.mode]] if image.mode in UNUSUAL else []
            if image.getexif().get(ORIENTATION, 1) != 1:
                notes.append("rotated by its EXIF")
                image = ImageOps.exif_transpose(image)
            if image.has_transparency_data:
                notes.append("transparent")
            return RESIZES[settings["resize"]](to_rgb(image), settings["size"]).tobytes(), notes
    except Exception:  # Pillow raises many kinds for broken files
        return None, ["broken, or no image"]


def to_rgb(image):
    """Transparency becomes white, 16 bits become 8."""
    if image.mode.startswith("I"):
        image = image.point(lambda value: value / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def tidy(caption):
    """(the caption on one line, what was unusual about it). Any text is a caption, the empty one too."""
    caption = " ".join(caption.encode(errors="replace").decode().split())  # half a surrogate pair is no text
    found = {
        "empty caption": not caption,
        "long caption": len(caption) > LONG_CAPTION,
        "caption with other letters than ASCII": not caption.isascii(),
    }
    return caption, [note for note, applies in found.items() if applies]


def by_note(pairs):
    """(name, note) pairs -> note -> the names."""
    names = {}
    for name, note in pairs:
        names.setdefault(note, []).append(name)
    return names


def in_words(manifest):
    lines = [f"data: {manifest['images']} images from {manifest['records']} records"]
    lines += [
        f"{kind}: {len(v)} {note}" for kind in ("skipped", "converted") for note, v in manifest[kind].items()
    ]
    return "; ".join(lines)


def check_broken(manifest, folder, data_dir, allow_broken):
    """Raises UserError if there is no image, or too many are broken."""
    skipped = manifest["skipped"]
    broken = [(names[0], len(names), note) for note, names in skipped.items() if note not in NO_DAMAGE]
    there = manifest["records"] - sum(len(skipped.get(note, [])) for note in NO_DAMAGE)
    share = sum(count for _, count, _ in broken) / max(1, there)
    list_of_all = f"all are listed in {folder / 'manifest.json'}"
    if not manifest["images"]:
        raise UserError(
            f"--data-dir {data_dir}: none of its {manifest['records']} images can be used; {list_of_all}"
        )
    if share > TOLERATED and not allow_broken:
        first, _, note = broken[0]
        raise UserError(
            f"--data-dir {data_dir}: {share:.1%} of its records are broken (the first: {first}, {note}); "
            f"{list_of_all}; --allow-broken takes the others"
        )
