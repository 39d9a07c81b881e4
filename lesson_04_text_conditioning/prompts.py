"""Prompts on the command line: flags, files of prompts, and how a grid of their samples is arranged."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from common.cli import PositiveInt
from common.errors import UserError
from common.files import read_text
from common.sampling import SampleConfig


@dataclass(frozen=True)
class PromptConfig(SampleConfig):
    """Settings of sampling from prompts."""

    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()  # what to draw; can be repeated
    prompts_file: str | None = None  # a text file with one prompt per line
    num_samples: PositiveInt | None = None  # per prompt; default 8 per --prompt, 1 per line of --prompts-file

    def prompts(self, default: Sequence[str]) -> list[str]:
        """Return one prompt per sample; `default` is used if no flag names any. Raises UserError."""
        prompts: Sequence[str]
        if self.prompts_file is None:
            each, prompts = self.num_samples or 8, self.prompt or default
        else:
            each, prompts = self.num_samples or 1, [*self.prompt, *read_prompts(self.prompts_file)]
        for prompt in prompts:
            if not is_text(prompt):
                raise UserError(f"--prompt {prompt!r} is not text in UTF-8")
        return [prompt for prompt in prompts for _ in range(each)]


def is_text(prompt: str) -> bool:
    """Return False if a prompt comes from bytes that are not UTF-8: UTF-16 is full of zeros."""
    return "\0" not in prompt and prompt == prompt.encode(errors="replace").decode()


def read_prompts(path: str) -> list[str]:
    """Return the lines of a file that are not empty. Raises UserError if there are none, or no text."""
    try:
        lines = read_text(path).splitlines()
    except OSError as error:
        raise UserError(f"--prompts-file {path} cannot be read ({error.strerror})") from None
    except UnicodeError:
        raise UserError(f"--prompts-file {path} is not a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path} holds no prompts; write one per line")
    return prompts


def warn_truncated(tokenizer: Any, prompts: Sequence[str]) -> None:
    """Print a line for each prompt with more tokens than the network reads."""
    for prompt in dict.fromkeys(prompts):
        if (count := len(tokenizer.token_ids(prompt))) > (length := tokenizer.context_length):
            print(f'truncated: "{prompt[:40]}..." has {count} tokens, of which the network reads {length}')


def grid_layout(prompts: Sequence[str]) -> dict[str, Any]:
    """Return arguments for `plot_grid`: a labelled row per prompt, if all have equally many samples.

    Returns {} if prompts are not grouped, differ in count, have one sample each or more than 16.
    """
    distinct = list(dict.fromkeys(prompts))
    each = len(prompts) // len(distinct)
    if list(prompts) != [prompt for prompt in distinct for _ in range(each)] or not 1 < each <= 16:
        return {}
    return {"columns": each, "row_labels": [prompt[:60] for prompt in distinct]}
