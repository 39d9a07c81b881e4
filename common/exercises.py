"""Exercises inside notebooks: the reader writes a function, a check says what is wrong, the notebook goes on.

    reverse_step = exercise(reverse_step, check=checks.reverse_step, reference=solutions.reverse_step)

The result is the reader's function if it is right, and the reference while it is blank or wrong.
"""

import contextlib
import dis
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


class WrongAnswer(Exception):
    """What is wrong with an answer, in one sentence that helps."""


Check = Callable[[Callable], None]  # raises WrongAnswer


@contextlib.contextmanager
def explaining(fragment: str, message: str) -> Iterator[None]:
    """Turn a RuntimeError whose text contains `fragment` into a WrongAnswer with this message."""
    try:
        yield
    except RuntimeError as error:
        if fragment in str(error):
            raise WrongAnswer(message) from error
        raise


def numbered(number: str) -> Callable[[Check], Check]:
    """Give a check the number of its exercise, for instance "1.5"."""

    def decorate(check: Check) -> Check:
        check.number = number  # type: ignore[attr-defined]
        return check

    return decorate


def exercise(answer: Callable, *, check: Check, reference: Callable) -> Callable:
    """Print whether `answer` is blank, right or wrong; return it if it is right, else `reference`."""
    verdict = judge(answer, check)
    use = "" if verdict == "correct." else " The notebook continues with the reference solution."
    print(f"Exercise {check.number}: {verdict}{use}")  # type: ignore[attr-defined]
    return answer if verdict == "correct." else reference


def judge(answer: Callable, check: Check) -> str:
    """Return "to do." for a blank function, "correct." or "not yet. ..." with the reason."""
    if is_blank(answer):
        return "to do."
    try:
        check(answer)
    except WrongAnswer as wrong:
        return f"not yet. {wrong}"
    except Exception as error:  # whatever an answer may do
        reason = (str(error) or "no message").splitlines()[0]
        return f"not yet. It raises {type(error).__name__}: {reason}"
    return "correct."


def is_blank(function: Callable) -> bool:
    """Return whether a function's body, below its decorators, is only a docstring, `...` or `pass`.

    A class counts as blank while its `forward` is.
    """
    if inspect.isclass(function):  # a network: the reader writes `forward`
        function = getattr(function, "forward", function)
    function = inspect.unwrap(function)
    if not hasattr(function, "__code__"):  # a partial, for instance
        return False
    harmless = {"RESUME", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST", "NOP", "COPY_FREE_VARS"}
    instructions = list(dis.get_instructions(function))
    returned = [i.argval for i in instructions if i.opname in ("LOAD_CONST", "RETURN_CONST")]
    return {i.opname for i in instructions} <= harmless and all(value is None for value in returned)


def allclose(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors have the same shape and, up to rounding, the same values."""
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4)


def expect_shape(result: Any, shape: tuple[int, ...]) -> None:
    """Raise WrongAnswer unless the result is a tensor of this shape, of finite numbers."""
    if not isinstance(result, Tensor):
        raise WrongAnswer(f"It returns {type(result).__name__}; return a tensor.")
    if tuple(result.shape) != tuple(shape):
        raise WrongAnswer(f"It returns the shape {tuple(result.shape)}; expected {tuple(shape)}.")
    if not result.isfinite().all():
        raise WrongAnswer("The result contains NaN or infinity.")
