"""Flags: ranges and help texts of every script, and what run_command does with bad input."""

import ast
import importlib
import re
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
import tyro

from common.cli import (
    POSITIVE,
    Bounds,
    Fraction,
    GuidanceScale,
    PositiveFloat,
    PositiveInt,
    Seed,
    bounds_in,
    check_choice,
    check_flags,
    flag_name,
    run_command,
)
from common.errors import UserError
from common.training.config import TrainConfig
from tests.conftest import PACKAGES, ROOT

INFINITY, NAN = float("inf"), float("nan")


# -- ranges --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bounds, right, wrong",
    [
        (Bounds(1, 10, "lie between 1 and 10"), [1, 10, 5.5], [0, 11, 0.999, -INFINITY]),
        (Bounds(0, 1, "lie between 0 and 1", open_low=True), [1e-9, 1], [0, -1, 1.001, -INFINITY]),
        (POSITIVE, [1, 1e-300, 1e300], [0, -1, -INFINITY]),
    ],
)
def test_both_ends_of_a_range(bounds, right, wrong):
    for value in right:
        bounds.check("--flag", value)
    for value in wrong:
        with pytest.raises(UserError) as error:
            bounds.check("--flag", value)
        assert str(error.value) == f"--flag is {value}; it must {bounds.message}"


@pytest.mark.parametrize(
    "bounds", [Bounds(-1, 1, "lie between -1 and 1"), POSITIVE, Bounds(0, INFINITY, "x")]
)
def test_nan_and_infinity_are_in_no_range(bounds):
    with pytest.raises(UserError, match=f"--flag is nan; it must {bounds.message}"):
        bounds.check("--flag", NAN)
    with pytest.raises(UserError, match="--flag is inf; it must be finite"):
        bounds.check("--flag", INFINITY)


@dataclass(frozen=True)
class Example:
    steps: PositiveInt | None = None
    scales: tuple[GuidanceScale, ...] = (1, 3)
    dropout: Annotated[Fraction, tyro.conf.arg(aliases=["--old"])] = 0.1
    pairs: tuple[tuple[PositiveFloat, ...], ...] | None = None
    seed: Seed = 0
    anything: float = 0.0
    name: str | None = None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "--steps is 0; it must be greater than zero"),
        ({"scales": (1.0, -2.0)}, "--scales is -2.0; it must be 0"),
        ({"scales": (NAN,)}, "--scales is nan; it must be 0"),
        ({"dropout": 1.5}, "--dropout is 1.5; it must lie between 0 and 1"),
        ({"seed": 2**31}, "--seed is 2147483648; it must lie between 0 and 2147483647"),
        ({"name": ""}, "--name is empty; leave it out"),
    ],
)
def test_ranges_in_tuples_and_optional_flags(settings, message):
    check_flags(Example())  # None is not a number
    check_flags(Example(steps=1, scales=(), dropout=1, seed=2**31 - 1, anything=-INFINITY, name="x"))
    with pytest.raises(UserError, match=re.escape(message)):
        check_flags(Example(**settings))


def test_a_range_is_found_at_any_depth_of_a_type():
    hints = get_type_hints(Example, include_extras=True)
    found = {name: len(list(bounds_in(hint))) for name, hint in hints.items()}
    assert found == {
        "steps": 1, "scales": 1, "dropout": 1, "pairs": 1, "seed": 1, "anything": 0, "name": 0
    }  # fmt: skip


# -- every script --------------------------------------------------------------------------------------------

# Numbers without a range in their type, and what checks them instead.
WITHOUT_RANGE = {
    "lesson_06_miniglide/sample.py --noise-level": "load_upsampler: which levels the upsampler knows",
    "lesson_06_miniglide/evaluate.py --noise-level": "load_upsampler: which levels the upsampler knows",
    "lesson_06_miniglide/report_tables.py --table": "check_choice: 1 or 2",
}


def run_command_calls(path):
    """Return the calls of run_command in a file."""
    calls = [
        node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)
    ]
    return [call for call in calls if getattr(call.func, "id", "") == "run_command"]


SCRIPTS = [p for package in PACKAGES for p in sorted((ROOT / package).rglob("*.py")) if run_command_calls(p)]


def config_of(path):
    """Return the configuration dataclass of a script: the second argument of run_command."""
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    (call,) = run_command_calls(path)
    config_type = getattr(module, call.args[1].id)
    assert is_dataclass(config_type)
    return config_type


def has_number(hint):
    if get_origin(hint) is Annotated:
        return has_number(get_args(hint)[0])
    return hint in (int, float) or any(has_number(part) for part in get_args(hint))


def test_the_scripts_are_found():
    names = {str(path.relative_to(ROOT)) for path in SCRIPTS}
    assert {"lesson_01_ddpm/train_mnist.py", "lesson_06_miniglide/train.py"} <= names and len(names) > 20
    assert "common/cli.py" not in names


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_number_has_a_range(path):
    config_type = config_of(path)
    hints = get_type_hints(config_type, include_extras=True)
    numbers = [field.name for field in fields(config_type) if has_number(hints[field.name])]
    unbounded = {flag_name(name) for name in numbers if not list(bounds_in(hints[name]))}
    known = {flag.split()[1] for flag in WITHOUT_RANGE if Path(flag.split()[0]) == path.relative_to(ROOT)}
    assert unbounded == known


def help_entries(text):
    """Return one text per argument of what --help prints, except --help itself."""
    _, *boxes = re.split(r"^\W*(?:positional arguments|options)\W*$", text, flags=re.MULTILINE)
    lines = [line.replace("│", " ").rstrip() for box in boxes for line in box.splitlines()]
    lines = [line for line in lines if re.search(r"\w", line)]  # no frames
    starts = [i for i, line in enumerate(lines) if re.match(r"  [^\s-]|  --", line)]
    return ["\n".join(lines[a:b]).strip() for a, b in zip(starts, [*starts[1:], len(lines)])]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_flag_has_a_help_text(path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "1000")  # no line breaks
    assert without_help(config_of(path), capsys) == []


def without_help(config_type, capsys):
    """Return the arguments whose help is empty.

    A field's comment becomes its help, unless ruff has moved it to another line or it is for mypy.
    """
    with pytest.raises(SystemExit):
        tyro.cli(config_type, args=["--help"])
    entries = help_entries(capsys.readouterr().out)
    assert len(entries) == len(fields(config_type)), entries
    missing = []
    for entry in entries:
        argument, help_text = re.split(r"\n| {2,}", entry, maxsplit=1)
        text = re.sub(r"\((default: .*|required|repeatable|optional)\)$", "", help_text.strip())
        if len(text) < 3 or text.startswith(("type:", "noqa", "fmt:")):
            missing.append(argument.split()[0])
    return missing


@dataclass(frozen=True)
class NoHelp:
    good: int = 0  # has a help text
    empty: int = 0
    moved: int = (
        0  # by a formatter
    )  # fmt: skip
    typed: int | None = None  # type: ignore[assignment]  # of a base class


def test_empty_help_texts_are_found(capsys):
    assert without_help(NoHelp, capsys) == ["--empty", "--moved", "--typed"]


# -- run_command ---------------------------------------------------------------------------------------------


def exit_code(*args, **kwargs):
    with pytest.raises(SystemExit) as stop:
        run_command(*args, **kwargs)
    return stop.value.code


def test_what_can_be_fixed_is_one_line_and_exit_code_2(capsys):
    def fail(config):
        raise UserError("--name x is taken; choose another")

    assert exit_code(fail, Example, argv=[]) == 2
    assert capsys.readouterr().err == "error: --name x is taken; choose another\n"


def test_wrong_flags_are_refused_before_any_work(capsys):
    called = []
    assert exit_code(called.append, Example, argv=["--steps", "-3"]) == 2
    assert capsys.readouterr().err == "error: --steps is -3; it must be greater than zero\n"
    assert exit_code(called.append, Example, argv=["--scales", "1", "nan"]) == 2
    assert "--scales is nan" in capsys.readouterr().err
    assert called == []


def test_ctrl_c_is_exit_code_130(capsys):
    def interrupted(config):
        raise KeyboardInterrupt

    assert exit_code(interrupted, Example, argv=[]) == 130
    assert capsys.readouterr().err == ""


def test_other_errors_are_not_hidden():
    def broken(config):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command(broken, Example, argv=[])


def test_a_resumed_run_keeps_the_flags_that_are_not_given():
    def saved_config(resume, config_type):
        assert (resume, config_type) == ("run", TrainConfig)
        return TrainConfig(steps=7, batch_size=3, optimizer="muon", seed=5)

    seen = []
    argv = ["--resume", "run", "--steps", "9"]
    run_command(seen.append, TrainConfig, saved_config, argv)
    assert seen == [TrainConfig(steps=9, batch_size=3, optimizer="muon", seed=5, resume="run")]


def test_a_dry_run_cannot_be_resumed(capsys):
    saved = TrainConfig(steps=7)
    argv = ["--resume", "run", "--dry-run"]
    assert exit_code(lambda config: None, TrainConfig, lambda *_: saved, argv) == 2
    assert "--dry-run with --resume would end the run" in capsys.readouterr().err


def test_an_unknown_choice_lists_the_known_ones():
    check_choice("--sampler", "ddim", {"ddpm": 1, "ddim": 2})
    with pytest.raises(UserError, match=r"^--sampler euler is unknown; choose ddpm, ddim$"):
        check_choice("--sampler", "euler", {"ddpm": 1, "ddim": 2})
