"""Files that are either complete or not there, folders that belong to one run, locks."""

import codecs
import contextlib
import itertools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError

from common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

ROOT = Path(__file__).parent.parent  # of the repository
BYTE_ORDER_MARKS = {  # those of UTF-32 first, because one begins like one of UTF-16
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
    codecs.BOM_UTF8: "utf-8-sig",
}


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
        raise write_error(path, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_error(path: str | Path, error: Exception) -> UserError:
    """Return the error that says which file cannot be written, and why."""
    return UserError(f"{path} cannot be written ({getattr(error, 'strerror', None) or error})")


def write_text(path: str | Path, text: str) -> None:
    r"""Write a UTF-8 text file atomically; what UTF-8 cannot encode is escaped (\udce9). Raises UserError."""
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8", errors="backslashreplace"))


def read_text(path: str | Path, errors: str = "strict") -> str:
    """Return a text file, with newlines as line ends.

    A byte order mark says whether it is in UTF-8, UTF-16 or UTF-32; without one it is in UTF-8. errors: as in
    `bytes.decode`. Raises OSError, and UnicodeError if the text is in another encoding.
    """
    return decode_text(Path(path).read_bytes(), errors)


def decode_text(content: bytes, errors: str = "strict") -> str:
    """Return the text of a file with this content; see `read_text`. Raises UnicodeError."""
    encodings = (encoding for mark, encoding in BYTE_ORDER_MARKS.items() if content.startswith(mark))
    text = content.decode(next(encodings, "utf-8"), errors)
    return text.replace("\r\n", "\n").replace("\r", "\n")


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


def make_new_folder(folder: Path, flag: str) -> Path:
    """Create a folder that no other process has, and return it: `folder`, or the first free of folder_2, ...

    Raises UserError, naming the flag, if no folder can be created there.
    """
    make_folder(folder.parent, flag)
    for i in itertools.count(1):
        new = folder if i == 1 else folder.with_name(f"{folder.name}_{i}")
        try:
            new.mkdir()
            return new
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(f"{flag} {new} cannot be created or written ({error.strerror})") from None
    raise AssertionError("unreachable: the loop is endless")


def lock_file(path: Path, wait: bool = True) -> IO[str]:
    """Return an open file that this process alone has locked, until it is closed or the process ends.

    wait: until another process releases the lock; otherwise BlockingIOError is raised. On a file system
    without locks, as some NFS and Lustre mounts are, a warning is printed and nothing is locked; on Windows
    nothing is. Raises UserError if the file cannot be written.
    """
    try:
        file = open(path, "w", encoding="utf-8")  # noqa: SIM115 (open as long as the lock)
    except OSError as error:
        raise write_error(path, error) from None
    if not fcntl:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # POSIX allows both
        file.close()
        raise BlockingIOError(f"{path} is locked by another process") from None
    except OSError as error:
        print(
            f"warning: {path} cannot be locked ({error.strerror}); let no other process use its folder",
            file=sys.stderr,
        )
    return file
