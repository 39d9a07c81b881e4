"""Prompts on the command line, for the sample.py of lessons 4 and 5."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.command import UserError
from common.sampling import SampleConfig, write_samples
from lesson_04_text_conditioning.captioned_mnist import IMAGE_SHAPE, sampler_of_prompts, tokenizer_of


@dataclass(frozen=True)
class PromptConfig(SampleConfig):
    prompt: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction
    ] = ()  # what to draw; can be given several times
    prompts_file: str | None = None  # a text file, a prompt a line
    num_samples: int | None = None  # of each prompt; default 8 of a --prompt, 1 of a line of --prompts-file

    def prompts(self):
        """The prompts to draw, one a sample. Raises UserError if there are none."""
        if self.prompts_file is None:
            each, prompts = self.num_samples or 8, list(self.prompt) or ["a red seven"]
        else:
            each, prompts = self.num_samples or 1, [*self.prompt, *read_prompts(self.prompts_file)]
        return [prompt for prompt in prompts for _ in range(each)]


def read_prompts(path):
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--prompts-file {path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"--prompts-file {path} is not a text file in UTF-8") from None
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UserError(f"--prompts-file {path} holds no prompts; write one a line")
    return prompts


def write_prompt_samples(config, prompts, network, facts, start):
    """Draw every prompt and write config.out. start: as for `sampler_of_prompts`."""
    tokenizer = tokenizer_of(facts)
    for prompt in dict.fromkeys(prompts):
        if (count := len(tokenizer.pieces(prompt))) > tokenizer.context:
            print(
                f'cut: of "{prompt[:40]}..." ({count} tokens) the network reads the first {tokenizer.context}'
            )
    start_at = sampler_of_prompts(network, tokenizer, prompts, start)
    distinct = list(dict.fromkeys(prompts))
    same = len(prompts) == len(distinct) * (each := len(prompts) // len(distinct)) and each > 1
    labels = {"row_labels": [prompt[:60] for prompt in distinct]} if same and each <= 16 else {}
    write_samples(config, start_at, IMAGE_SHAPE, prompts, columns=each if labels else 8, **labels)
