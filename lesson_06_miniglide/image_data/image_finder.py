"""Find the image that a file of captions names, on whichever machine that file was written."""

import unicodedata
from collections.abc import Iterable
from pathlib import Path
from posixpath import dirname, normpath

from common.errors import UserError

DIGITS = "0123456789"


class ImageFinder:
    """Finds images by the names in one file of captions.

    images: all paths below the data folder. captions: path of the file with captions. split: the part of the
    data set that it describes ("train2017"); images are then looked for below folders of that name. Without
    such folders they are looked for next to the file with captions and below, or if no image is there,
    everywhere but in the folders of the splits that `others` names.
    """

    def __init__(
        self, folder: Path, images: Iterable[str], captions: str, split: str = "", others: Iterable[str] = ()
    ):
        self.captions, self.parent = captions, normalized(dirname(captions))
        self.roots = [f"{normalized(str(root))}/" for root in (folder.absolute(), folder.resolve())]
        self.paths: dict[str, list[str]] = {}  # normalized path -> paths on the disk, nearly always one
        for path in images:
            self.paths.setdefault(normalized(path), []).append(path)
        self.folders = {name for path in self.paths for name in path.split("/")[:-1]}
        of_split = {path: path_below_split(path, split) for path in self.paths}
        shared = [path for path in self.paths if not any(path_below_split(path, other) for other in others)]
        prefix = f"{self.parent}/" if self.parent else ""
        next_to = {path: path.removeprefix(prefix) for path in shared if path.startswith(prefix)}
        # normalized path -> the part of it below the folder in which this file's images are
        self.below = {path: rest for path, rest in of_split.items() if rest} or next_to
        self.below = self.below or {path: path for path in shared}
        self.by_name: dict[str, list[str]] = {}  # last part of a path -> normalized paths
        for path in self.below:
            self.by_name.setdefault(path.rpartition("/")[2], []).append(path)

    def find(self, name: str) -> str | None:
        """Return the path of the image that is listed as `name`, or None if there is none.

        The first of these that exists is taken: the whole path; the path below the split's folder; the path
        without its first folders, if there are no such folders here. Raises UserError if several images fit.
        """
        wanted = normalized(name)
        for root in self.roots:
            wanted = wanted.removeprefix(root)
        wanted = normpath(wanted)
        whole = [normpath(f"{self.parent}/{wanted}").lstrip("/"), *([wanted] if "/" in wanted else [])]
        for path in whole:
            if path in self.paths:
                return self.only(name, [path])
        parts = wanted.split("/")
        candidates = self.by_name.get(parts[-1], [])
        for i, part in enumerate(parts):
            ending = "/".join(parts[i:])
            fitting = [path for path in candidates if f"/{path}".endswith(f"/{ending}")]
            if fitting:
                return self.only(name, [path for path in fitting if self.below[path] == ending] or fitting)
            if part in self.folders:  # the image belongs there; elsewhere, the same name is another image
                candidates = [path for path in candidates if part in path.split("/")[:-1]]
        return None

    def only(self, name: str, keys: list[str]) -> str:
        """Return the only image of these normalized paths. Raises UserError if there are several."""
        paths = [path for key in keys for path in self.paths[key]]
        if name in paths:
            return name
        if len(paths) > 1:
            raise UserError(
                f"--data-dir: {self.captions} lists {name}, which may be {paths[0]} or {paths[1]}; "
                "list images by their path below the folder"
            )
        return paths[0]


def normalized(path: str) -> str:
    """Return a path with the slashes of Unix (not of Windows) and with composed letters (unlike macOS)."""
    return unicodedata.normalize("NFC", path.replace("\\", "/"))


def path_below_split(path: str, split: str) -> str:
    """Return the path below the folder of a split, or "" if it is in none.

    train2017 is also looked for in a folder train, and train in train2017.
    """
    parts = path.split("/")
    for i, part in enumerate(parts[:-1]):
        if split and (split in (part, part.rstrip(DIGITS)) or part == split.rstrip(DIGITS)):
            return "/".join(parts[i + 1 :])
    return ""
