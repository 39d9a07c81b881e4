"""The two tables of the report of miniGLIDE, drawn from any checkpoint.

python lesson_06_miniglide/tables.py --checkpoint runs/lesson_06_miniglide/...

Table 1: every caption at guidance scales 1, 3, 6 and 12, one caption a row. Table 2: four captions, several
samples of each at one scale.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro

from common.command import check_choice, run_command
from common.pictures import label_grid
from common.runs import make_folder, write_atomically
from lesson_06_miniglide.generate import Generator


@dataclass(frozen=True)
class Config:
    """Draw the report's tables 1 and 2."""

    checkpoint: str | None = None  # a .safetensors file or a run's folder; default: the shipped weights
    table: int = 1  # 1: captions by scales; 2: four captions, several samples
    # the captions; can be given several times; default: six (table 2: four) of its training's pictures
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    scales: tuple[float, ...] = (1, 3, 6, 12)  # of table 1
    guidance_scale: float = 3.0  # of table 2
    num_samples: int = 8  # of a caption, in table 2
    steps: int = 50
    sampler: str = "dpm++"  # ddpm, ddim or dpm++
    seed: int = 0
    device: str = "auto"
    out: str = "tables"  # the folder for table_1.png, table_2.png


def table_1(generator, prompts, config):
    """The same noise in every column, so that what differs between columns is the scale alone."""
    columns = [generator.draw(prompts, s, config, config.steps, config.sampler) for s in config.scales]
    images = torch.stack(columns, 1).flatten(0, 1)
    names = [f"s = {scale:g}" for scale in config.scales]
    return label_grid(images, len(names), row_labels=prompts, column_labels=names)


def table_2(generator, prompts, config):
    repeated = [prompt for prompt in prompts for _ in range(config.num_samples)]
    images = generator.draw(repeated, config.guidance_scale, config, config.steps, config.sampler)
    return label_grid(images, config.num_samples, row_labels=prompts)


def main(config):
    check_choice("--table", config.table, (1, 2))
    generator = Generator.load_base(config.checkpoint, config.device)
    make_folder(config.out, "--out")
    prompts = config.prompt or generator.prompts[: 6 if config.table == 1 else 4]
    figure = (table_1 if config.table == 1 else table_2)(generator, prompts, config)
    path = Path(config.out) / f"table_{config.table}.png"
    write_atomically(path, figure.savefig)
    print(f"look at {path}")


if __name__ == "__main__":
    run_command(main, Config)
