"""From prompts on the command line to a file of samples, for the sample.py of lessons 4 and 5."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from common.command import UserError
from common.sampling import SampleConfig, load_for_sampling, write_samples
from lesson_04_text_conditioning import captioned_mnist


@dataclass(frozen=True)
class PromptConfig(SampleConfig):
    # what to draw; can be given several times
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    prompts_file: str | None = None  # a text file, a prompt a line
    num_samples: int | None = None  # of each prompt; default 8 of a --prompt, 1 of a line of --prompts-file

    def prompts(self, default):
        """The prompts to draw, one a sample; `default` if no flag names any. Raises UserError."""
        if self.prompts_file is None:
            each, prompts = self.num_samples or 8, self.prompt or default
        else:
            each, prompts = self.num_samples or 1, [*self.prompt, *read_prompts(self.prompts_file)]
        for prompt in prompts:
            if not is_text(prompt):
                raise UserError(f"--prompt {prompt!r} is not text in UTF-8")
        return [prompt for prompt in prompts for _ in range(each)]


def is_text(prompt):
    """False for what the command line was given in bytes that are no UTF-8."""
    return prompt == prompt.encode(errors="replace").decode()


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


def sample_prompts(
    config,
    lesson,
    samplers,
    denoiser_for,
    rebuild=captioned_mnist.rebuild,
    tokenizer_of=captioned_mnist.tokenizer_of,
):
    """Draw every prompt and write config.out. denoiser_for: as `denoiser_of_prompts` takes it."""
    sampler, network, facts = load_for_sampling(config, lesson, samplers, rebuild)
    prompts = config.prompts(facts.get("prompts", ["a red seven"]))
    tokenizer = tokenizer_of(facts)
    say_what_is_cut(tokenizer, prompts)
    denoiser_of = captioned_mnist.denoiser_of_prompts(network, tokenizer, prompts, denoiser_for)
    write_samples(config, sampler, denoiser_of, network.image_shape, prompts, **in_rows(prompts))


def say_what_is_cut(tokenizer, prompts):
    for prompt in dict.fromkeys(prompts):
        if (count := len(tokenizer.pieces(prompt))) > (room := tokenizer.context):
            print(f'cut: of "{prompt[:40]}..." ({count} tokens) the network reads the first {room}')


def in_rows(prompts):
    """For common.sampling: a row a prompt, with its name, where each has as many samples and fits a row."""
    distinct = list(dict.fromkeys(prompts))
    each = len(prompts) // len(distinct)
    if prompts != [prompt for prompt in distinct for _ in range(each)] or not 1 < each <= 16:
        return {}
    return {"columns": each, "row_labels": [prompt[:60] for prompt in distinct]}
