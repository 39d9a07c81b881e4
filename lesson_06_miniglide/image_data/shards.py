"""Read WebDataset shards, tar files in which the files of an image are next to each other, in one pass.

    00000.tar     000000000.jpg, 000000000.txt, 000000000.json, 000000001.jpg, ...     (img2dataset)

Nothing is extracted to the disk. A key ends at the first dot of a name, as in the library webdataset.
"""

import json
import lzma
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from posixpath import basename, dirname, normpath
from typing import Any, NamedTuple

from common.files import decode_text
from lesson_06_miniglide.image_data import records as problem
from lesson_06_miniglide.image_data.readers import Found
from lesson_06_miniglide.image_data.records import (
    CAPTION_SUFFIXES,
    EncodedRecord,
    Files,
    Record,
    is_image,
    to_record,
)

SHARD_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
DAMAGE = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


class Member(NamedTuple):
    """A file in a shard."""

    name: str
    content: bytes

    @property
    def key(self) -> str:
        """What the names of an image's files have in common."""
        return f"{dirname(self.name)}/{basename(self.name).partition('.')[0]}"


class StrictTarInfo(tarfile.TarInfo):
    """A header; a damaged one is an error, where tarfile takes it for the end of the file."""

    @classmethod
    def frombuf(cls, buf: Any, encoding: str, errors: str) -> "StrictTarInfo":
        """Return the header in a block of 512 bytes. Raises tarfile.ReadError."""
        try:
            return super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as error:
            if len(buf) == tarfile.BLOCKSIZE and not any(buf):  # the mark of the end
                raise
            raise tarfile.ReadError(
                "unexpected end" if len(buf) < tarfile.BLOCKSIZE else str(error)
            ) from None


@dataclass
class Shard:
    """The records of a shard, which is read again from its start by every iteration."""

    folder: Path  # of the data set
    path: str  # below the folder
    damage: list[str] = field(default_factory=list)  # what stopped the latest iteration

    def __iter__(self) -> Iterator[Record]:
        self.damage.clear()
        for _, members in groupby(self.members(), lambda member: member.key):
            yield from self.to_records(list(members))
        for reason in self.damage:
            yield Record(self.path, "", f"the rest of it cannot be read ({reason})")

    def members(self) -> Iterator[Member]:
        """Yield the images, captions and .json files up to the first damage, but no hidden files."""
        try:
            with (
                open(self.folder / self.path, "rb") as file,
                tarfile.open(fileobj=file, mode="r|*", tarinfo=StrictTarInfo) as tar,
            ):
                for info in tar:
                    wanted = is_image(info.name) or info.name.lower().endswith((*CAPTION_SUFFIXES, ".json"))
                    if info.isfile() and wanted and not basename(info.name).startswith("."):
                        content = tar.extractfile(info)
                        assert content, "a file has content"
                        yield Member(normpath(info.name), content.read())
        except DAMAGE as error:
            self.damage.append(getattr(error, "strerror", None) or str(error) or type(error).__name__)

    def to_records(self, members: Sequence[Member]) -> Iterator[Record]:
        """Yield the record of the files of one key, and one for each image too many."""
        images = [member for member in members if is_image(member.name)]
        images.sort(key=lambda member: member.name.count("."))  # x.jpg before x.mask.png
        captions, trouble = read_captions(members)
        if not images:
            trouble = problem.NO_IMAGE_IN_SHARD if trouble != problem.NOT_DOWNLOADED else trouble
            yield to_record(f"{self.path}/{members[0].name}", captions, trouble)
            return
        if images[0].name.lower().endswith(problem.UNREAD_SUFFIXES):
            trouble = trouble or problem.UNKNOWN_FORMAT
        record = to_record(f"{self.path}/{images[0].name}", captions, trouble)
        yield EncodedRecord.of(record, images[0].content)
        for image in images[1:]:
            yield Record(f"{self.path}/{image.name}", "", problem.SECOND_IMAGE)


def read_captions(members: Sequence[Member]) -> tuple[Any, str | None]:
    """Return the captions that the files of one key have, and why they cannot be used.

    A .json with a caption comes first, because in a .txt a line break separates two captions.
    """
    captions: Any = None
    trouble: str | None = problem.NO_CAPTION_IN_SHARD
    for member in sorted(members, key=lambda member: member.name.endswith(".json")):
        if is_image(member.name):
            continue
        try:
            text = decode_text(member.content, "surrogateescape")
            row = json.loads(text) if member.name.lower().endswith(".json") else None
        except UnicodeError:
            return None, problem.NOT_UTF8
        except ValueError:
            return None, problem.BROKEN_JSON
        if row is None:
            captions, trouble = [line for line in text.split("\n") if line.strip()], None
        elif isinstance(row, dict) and "caption" in row:
            captions, trouble = captions if row["caption"] is None else row["caption"], None
            if row.get("status", "success") != "success":
                trouble = problem.NOT_DOWNLOADED
    return captions, trouble


def is_shard(path: str) -> bool:
    """Return whether a file has the name of a shard."""
    return path.lower().endswith(SHARD_SUFFIXES)


def read_shards(folder: Path, files: Files) -> Found | None:
    """Read WebDataset shards. img2dataset's .parquet and _stats.json next to them are not needed."""
    paths = [path for path in files if is_shard(path) and files[path] != problem.NOT_A_FILE]
    tables = {f"{path.removesuffix('.tar')}.parquet" for path in paths}
    streams = [Shard(folder, path) for path in paths]
    return Found(paths[0], [], {*paths, *tables}, streams=streams) if paths else None
