"""What the files of a data set say about an image: its captions, or why it cannot be used."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from common.errors import UserError

Files: TypeAlias = Mapping[str, tuple[int, int]]  # path below the data folder -> (bytes, modification time)
NOT_A_FILE = (-1, -1)  # instead of the two: a dead link, a pipe

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
UNREAD_SUFFIXES = (
    *(".avif", ".heic", ".heif", ".hif", ".jxl", ".jp2", ".j2k", ".jpx", ".svg", ".psd", ".tga", ".ico"),
    *(".apng", ".pbm", ".pgm", ".ppm", ".pnm", ".dds", ".exr", ".hdr", ".qoi", ".xcf"),
    *(".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),  # of cameras
)
CAPTION_SUFFIXES = (".txt", ".caption")
IMAGE_COLUMNS = ("image", "jpg", "png", "webp")  # usual names: diffusers', then img2dataset's
CAPTION_COLUMNS = ("text", "caption", "txt")

Caption: TypeAlias = str | tuple[str, ...]  # one caption, or several of the same image

# Problems are stored in caches: with a new wording, old caches no longer tell which are benign.
NOT_DOWNLOADED = "never downloaded"  # by img2dataset
NO_CAPTION = "no caption is for it"
DEAD_LINK = "a dead link, or not a file"
NOT_A_CAPTION = "no image is for it"  # README.txt
NOT_READ = "not read, because this layout keeps captions elsewhere"
NO_IMAGES_HERE = "none of its images is here"  # captions of another split
OTHER_SPLIT = "not read, because it is not of the split"
# The data are intact: a dead link, an image of another list, a file that is not part of the data set.
BENIGN_PROBLEMS = (
    *(NOT_DOWNLOADED, NO_CAPTION, DEAD_LINK, NOT_A_CAPTION, NOT_READ, NO_IMAGES_HERE),
    OTHER_SPLIT,
)

NO_IMAGE = "its image is missing"
NO_TEXT = "its .txt is missing"
NO_JSON = "its .json is missing"
NO_IMAGE_IN_SHARD = "no image is next to it in its .tar"
NO_CAPTION_IN_SHARD = "no .txt or .json with a caption is next to it in its .tar"
SECOND_IMAGE = "another image of the same key is used"
NOT_BYTES = "its row has neither bytes of an image nor its path"
BROKEN_JSON = "its .json is broken"
UNKNOWN_FORMAT = "its format cannot be read; convert it to PNG or JPEG"
NOT_UTF8 = "its caption is not text in UTF-8"
TOO_MANY_FIELDS = "its row has more fields than columns; quote a caption with commas"

# What bytes become that are not UTF-8, and what UTF-16 without a byte order mark is full of.
NOT_TEXT = re.compile("[\0\udc80-\udcff]")


class Record(NamedTuple):
    """An image and its captions as the data set's files list them. The image has not been opened yet."""

    image: str  # path below the data folder; of the file with captions, if an image has no path
    caption: Caption
    problem: str | None = None  # why there is no usable image


class EncodedRecord(Record):
    """A record of an image that is not a file of its own but a part of a larger one."""

    data = b""  # the encoded image

    @classmethod
    def of(cls, record: Record, data: bytes) -> "EncodedRecord":
        """Return the record with its encoded image."""
        encoded = cls(*record)
        encoded.data = data
        return encoded


class Source(NamedTuple):
    """A data set before it is decoded."""

    flag: str  # what the user gave, for messages
    name: str
    folder: Path  # that the paths of records start from
    state: Any  # changes with the data
    read: Callable[[], tuple[str, Sequence[Iterable[Record]]]]  # its layout, and its records in parts


class Columns(NamedTuple):
    """What to read of a table: the user's choice, where the flags name one."""

    image: str | None = None
    caption: str | None = None
    split: str = "train"

    def are_usual(self) -> bool:
        """Return whether layouts without columns and splits of these names, too, mean the same."""
        image, caption = self.image in (None, *IMAGE_COLUMNS), self.caption in (None, *CAPTION_COLUMNS)
        return image and caption and self.split == "train"

    def choose(self, present: Iterable[str], where: str) -> tuple[str, str]:
        """Return the columns with images and captions. Raises UserError, naming `where`, without them."""
        present = list(present)
        return (
            choose_column("--image-column", self.image, IMAGE_COLUMNS, present, where),
            choose_column("--caption-column", self.caption, CAPTION_COLUMNS, present, where),
        )


def choose_column(
    flag: str, name: str | None, usual: Iterable[str], present: Iterable[str], where: str
) -> str:
    """Return the name that the user gave, or else the first usual one, of the columns that are present."""
    wanted = [name] if name else list(usual)
    for column in wanted:
        if column in present:
            return column
    reason = f"has no column `{'` or `'.join(wanted)}`, only {', '.join(present)}"
    raise UserError(f"{where} {reason}; name one with {flag}")


def is_image(path: str) -> bool:
    """Return whether a file has the name of an image, also in a format that cannot be read."""
    return path.lower().endswith((*IMAGE_SUFFIXES, *UNREAD_SUFFIXES))


def all_captions(caption: Caption) -> tuple[str, ...]:
    """Return one or several captions as a tuple."""
    return (caption,) if isinstance(caption, str) else caption


def to_record(image: str, captions: Any, problem: str | None = None) -> Record:
    """Return a record from what a file has for a caption: a text, null, or a list of these.

    Anything else, and text that is not UTF-8, becomes the record's problem, unless it has one already.
    """
    values = captions if isinstance(captions, list) else [captions]
    for value in values:
        if not isinstance(value, str | None):
            problem = problem or f"its caption is not text but of the type {type(value).__name__}"
        elif value and NOT_TEXT.search(value):
            problem = problem or NOT_UTF8
    texts = tuple(value for value in values if isinstance(value, str))
    return Record(image, texts if len(texts) > 1 else "".join(texts), problem)


def merge_captions(records: Iterable[Record]) -> list[Record]:
    """Return the records with one for all usable ones of the same image, which gets all their captions."""
    merged: dict[Any, Record] = {}
    for i, record in enumerate(records):
        key = i if record.problem else record.image
        if key in merged:
            captions = all_captions(merged[key].caption) + all_captions(record.caption)
            record = record._replace(caption=captions)
        merged[key] = record
    return list(merged.values())
