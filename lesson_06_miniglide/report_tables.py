"""Lesson 6: the two tables of samples in the report of miniGLIDE, for any checkpoint.

    python lesson_06_miniglide/report_tables.py --checkpoint runs/lesson_06_miniglide/...

Table 1 has one row per caption and a column for each of the guidance scales 1, 3, 6 and 12. Table 2 has one
row per caption with several samples at the same scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import tyro
from matplotlib.figure import Figure

from common.cli import GuidanceScale, PositiveInt, Seed, check_choice, run_command
from common.files import make_folder, write_atomically
from common.plotting import plot_grid
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_06_miniglide.pipeline import MiniGlidePipeline

NUM_PROMPTS = {1: 6, 2: 4}  # default captions per table


@dataclass(frozen=True)
class Config:
    """Lesson 6: draw the report's tables 1 and 2."""

    checkpoint: str | None = None  # a .safetensors file or a run's folder; default: the pretrained weights
    table: int = 1  # 1: captions by guidance scales; 2: captions with several samples
    # the captions; can be repeated; default: six (table 2: four) of those previewed during training
    prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    scales: tuple[GuidanceScale, ...] = (1, 3, 6, 12)  # guidance scales of table 1
    guidance_scale: GuidanceScale = 3.0  # of table 2
    num_samples: PositiveInt = 8  # per caption, of table 2
    steps: PositiveInt = 50  # network evaluations per sample (with and without caption at once)
    sampler: str = "dpm++"  # ddpm, ddim or dpm++
    seed: Seed = 0  # of the noise
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str = "tables"  # folder for table_1.png and table_2.png


def draw_table_1(pipe: MiniGlidePipeline, prompts: Sequence[str], config: Config) -> Figure:
    """Return a figure with a column per guidance scale. All columns start from the same noise."""
    columns = [
        pipe(prompts, scale, config.steps, config.sampler, config.seed).tensor for scale in config.scales
    ]
    titles = [f"s = {scale:g}" for scale in config.scales]
    images = torch.stack(columns, 1).flatten(0, 1)
    return plot_grid(images, len(titles), row_labels=prompts, column_labels=titles)


def draw_table_2(pipe: MiniGlidePipeline, prompts: Sequence[str], config: Config) -> Figure:
    """Return a figure with a row of samples per caption."""
    n = config.num_samples
    output = pipe(prompts, config.guidance_scale, config.steps, config.sampler, config.seed, n)
    return plot_grid(output.tensor, n, row_labels=prompts)


def main(config: Config) -> None:
    check_choice("--table", config.table, NUM_PROMPTS)
    check_choice("--sampler", config.sampler, SAMPLERS)
    pipe = MiniGlidePipeline.from_pretrained(config.checkpoint, config.device)
    make_folder(config.out, "--out")
    prompts = config.prompt or pipe.metadata["prompts"][: NUM_PROMPTS[config.table]]
    draw_table = draw_table_1 if config.table == 1 else draw_table_2
    path = Path(config.out) / f"table_{config.table}.png"
    write_atomically(path, draw_table(pipe, prompts, config).savefig)
    print(f"look at {path}")


if __name__ == "__main__":
    run_command(main, Config)
