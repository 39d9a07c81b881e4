"""Files that are either complete or not there."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from common.errors import UserError

ROOT = Path(__file__).parent.parent  # of the repository


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary_path)` and move the result to `path`, so that a crash never leaves half a file.

    Raises UserError if the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write a UTF-8 text file atomically. Raises UserError."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def write_json(path: str | Path, content: Any, **dumps_kwargs: Any) -> None:
    """Write JSON atomically; `dumps_kwargs` are passed to json.dumps. Raises UserError."""
    write_text(path, json.dumps(content, indent=1, **dumps_kwargs) + "\n")


def read_json(path: str | Path) -> Any:
    """Return the content of a JSON file. Raises UserError if it is missing or broken."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def make_folder(folder: str | Path, flag: str) -> None:
    """Create a folder and its parents. Raises UserError, naming the flag, if it cannot be written."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be created or written ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder} cannot be written; name another folder")
