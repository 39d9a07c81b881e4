"""From a configuration dataclass to a command: parse flags, check them, answer bad input in one line."""

import contextlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import torch
import tyro

from common.device import keep_freed_memory, pick_device
from common.errors import UserError

Config = TypeVar("Config")


@dataclass(frozen=True)
class Bounds:
    """The allowed values of a flag; written into the type of its field: `Annotated[int, Bounds(1, 10)]`."""

    low: float
    high: float
    message: str  # completes "--flag is VALUE; it must ..."
    open_low: bool = False

    def check(self, flag: str, value: float) -> None:
        """Raise UserError if the value is out of bounds (NaN always is)."""
        inside = self.low < value <= self.high if self.open_low else self.low <= value <= self.high
        if not inside or value == float("inf"):
            message = "be finite" if value == float("inf") else self.message
            raise UserError(f"{flag} is {value}; it must {message}")


POSITIVE = Bounds(0, float("inf"), "be greater than zero", open_low=True)
PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
Fraction = Annotated[float, Bounds(0, 1, "lie between 0 and 1")]
Seed = Annotated[int, Bounds(0, 2**31 - 1, "lie between 0 and 2147483647")]
SampleCount = Annotated[int, Bounds(2, float("inf"), "be at least 2; one sample has no spread to measure")]
GuidanceScale = Annotated[
    float, Bounds(0, float("inf"), "be 0 (no caption), 1 (plain conditional model) or greater")
]


@contextlib.contextmanager
def forgiving_streams() -> Iterator[None]:
    """Print what is possible: no print raises because of a closed pipe, a full disk or a narrow encoding."""
    streams = [ForgivingStream(stream) if stream else None for stream in (sys.stdout, sys.stderr)]
    with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
        try:
            yield
        finally:
            for stream in filter(None, streams):
                stream.flush()  # here, where a failure is forgiven, and not when the interpreter ends


class ForgivingStream:
    """A text stream that escapes what its encoding lacks, and drops everything once it cannot be written."""

    def __init__(self, stream: Any):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write what can be written, and return the length of `text`."""
        try:
            self.stream.write(text)
        except UnicodeEncodeError:
            encoding = self.stream.encoding
            self.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError:
            self.drop()
        return len(text)

    def flush(self) -> None:
        try:
            self.stream.flush()
        except OSError:
            self.drop()

    def drop(self) -> None:
        """Let the stream's file be the null device."""
        with contextlib.suppress(OSError):  # a stream of a test or a notebook may have no file
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.stream.fileno())
            os.close(null)


@forgiving_streams()
def run_command(
    main: Callable[[Any], object],
    config_type: type[Config],
    saved_config: Callable[[str, type[Config]], Config] | None = None,
    argv: Sequence[str] | None = None,
) -> None:
    """Parse `argv` into `config_type` and call `main(config)`.

    saved_config: (path, config_type) -> config. With `--resume path`, flags that are not given keep the
    values of that configuration. A UserError, or running out of GPU memory, ends in one line on stderr and
    exit code 2; Ctrl-C in exit code 130. Output that cannot be printed ends nothing.
    """
    keep_freed_memory()
    config: Any = None
    try:
        config = tyro.cli(config_type, args=argv)
        if saved_config and config.resume:
            saved: Any = saved_config(config.resume, config_type)
            lists = explicit_list_flags(config)
            config = replace(tyro.cli(config_type, args=argv, default=saved), **lists)
        check_flags(config)
        main(config)
    except UserError as error:
        exit_with_error(str(error))
    except torch.OutOfMemoryError as error:
        reason = str(error).split(". GPU")[0]
        exit_with_error(f"{reason}; try {oom_hint(config)}")
    except KeyboardInterrupt:
        sys.exit(130)


def explicit_list_flags(config: Any) -> dict[str, tuple]:
    """Return the repeatable flags that were given; tyro would append them to those of a resumed run."""
    values = {field.name: getattr(config, field.name) for field in fields(config)}
    return {k: v for k, v in values.items() if isinstance(v, tuple) and v != getattr(type(config), k)}


def exit_with_error(message: str) -> None:
    """Print one line to stderr and exit with code 2."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(2)


def oom_hint(config: Any) -> str:
    """Name the flags of this configuration that reduce memory."""
    remedies = {
        "batch_size": "a smaller --batch-size",
        "activation_checkpointing": "--activation-checkpointing",
    }
    return " or ".join(text for name, text in remedies.items() if hasattr(config, name)) or "--device cpu"


def check_flags(config: Any) -> None:
    """Refuse wrong flags before any work is done. Raises UserError.

    Numbers are checked against the `Bounds` in their field's type. Empty strings, unavailable devices and
    `--dry-run` together with `--resume` are refused for every configuration.
    """
    pick_device(getattr(config, "device", "auto"))
    if getattr(config, "resume", None) and getattr(config, "dry_run", False):
        raise UserError("--dry-run with --resume would end the run after two steps; leave one of them out")
    hints = get_type_hints(type(config), include_extras=True)
    for field in fields(config):
        value = getattr(config, field.name)
        if value == "":
            raise UserError(f"{flag_name(field.name)} is empty; leave it out, or give it a value")
        for bounds in bounds_in(hints[field.name]):
            for number in value if isinstance(value, tuple) else (value,):
                if number is not None:
                    bounds.check(flag_name(field.name), number)


def bounds_in(hint: Any) -> Iterator[Bounds]:
    """Yield every `Bounds` inside a type hint, also within Optional and tuple."""
    yield from (extra for extra in getattr(hint, "__metadata__", ()) if isinstance(extra, Bounds))
    for part in get_args(hint):
        yield from bounds_in(part)


def flag_name(field_name: str) -> str:
    """Return a configuration field's name as it is typed on the command line."""
    return f"--{field_name.replace('_', '-')}"


def check_choice(name: str, value: Any, choices: Any) -> None:
    """Raise UserError, listing the choices, if `value` is not among them. name: of the flag or argument."""
    if value not in choices:
        raise UserError(f"{name} {value} is unknown; choose {', '.join(map(str, choices))}")
