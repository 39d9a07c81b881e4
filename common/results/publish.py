"""Make a finished run the one that its lesson shows: weights, results, figures, tables of all documents.

    python -m common.results.publish runs/lesson_05_cfg/2026-01-31_12-00-00

writes <lesson>/pretrained (weights in half precision) and <lesson>/results, and then fills the tables of all
Markdown files from the result files (common/results/report.py). Without a run it only fills the tables.

    python -m common.results.publish RUN --name dogs --evaluation evaluation/evaluation.json

publishes one of several models of lesson 6 as pretrained/dogs.safetensors and results/dogs, together with the
metrics that evaluate.py measured for it.
"""

import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import tyro

from common.cli import run_command
from common.errors import UserError
from common.files import read_json, write_atomically, write_json, write_text
from common.plotting import plot_losses
from common.results.report import documents, render_readme
from common.training.checkpoints import load_weights, pretrained_path, results_dir, save_weights
from common.training.metrics_csv import downsample_metrics, read_metrics, write_metrics

STEPS_PER_ROW = 20  # of the published metrics.csv
# Flags whose values only mean something on the machine of the run: left out of a command, or replaced.
PRIVATE_FLAGS = ("--cache-dir", "--out", "--checkpoint-dir", "--resume", "--continue-train")
PLACEHOLDERS = {"--data-dir": "DATA", "--init-from": "RUN", "--start-from": "RUN", "--vocabulary": "GPT2"}
PRIVATE_FIELDS = ("data_dir", "cache_dir", "out", "resume", "init_from", "vocabulary")
FIGURES = ("s*.png", "table_*.png")  # of a run's folder: samples, guidance sweep, tables of the report


@dataclass(frozen=True)
class PublishConfig:
    """Publish a finished run in its lesson's folder, and fill the tables of all documents."""

    run: tyro.conf.Positional[str | None] = None  # the run's folder; without it only the tables are filled
    name: str | None = None  # of the weights, if the lesson has several; default: the lesson's
    evaluation: str | None = None  # evaluation.json, in which lesson 6's evaluate.py measured only this run


def main(config: PublishConfig) -> None:
    if config.run:
        publish_run(Path(config.run), config.name, config.evaluation)
    for document in documents():
        write_text(document, render_readme(document))


def publish_run(run: Path, name: str | None = None, evaluation: str | None = None) -> None:
    """Write a run's weights to <lesson>/pretrained, and its metrics and figures to <lesson>/results.

    name, evaluation: as in `PublishConfig`. Raises UserError if the run is a dry run or has no weights.
    """
    info, measured = read_json(run / "config.json"), run / "metrics.json"
    if info["config"]["dry_run"]:
        raise UserError(f"{run} is a dry run; there is nothing to publish")
    lesson, command = info["lesson"], sanitize_command(info["command"])
    weights, metadata = load_weights(run, lesson)
    for field in PRIVATE_FIELDS:
        metadata["config"].pop(field, None)
    # the training run of an experiment has no metrics of its own
    metrics = read_json(measured) if measured.exists() else {"machine": info["machine"]}
    if evaluation:
        metrics |= read_json(evaluation)["rows"][0]
        del metrics["checkpoint"]  # a path on this machine
    metrics |= {"command": command, "minutes": metadata["minutes"], "steps": metadata["step"]}
    metrics["parameters"] = sum(weight.numel() for weight in weights.values())
    metadata |= {"command": command, "metrics": metrics}

    results, pretrained = results_dir(lesson, name), pretrained_path(lesson, name)
    for folder in (results, pretrained.parent):
        folder.mkdir(exist_ok=True, parents=True)
    write_atomically(pretrained, lambda path: save_weights(path, weights, metadata, half=True))
    write_json(results / "metrics.json", metrics)
    rows = read_metrics(run / "metrics.csv")
    shorter = downsample_metrics(rows, STEPS_PER_ROW)
    write_atomically(results / "metrics.csv", lambda path: write_metrics(path, shorter))
    plot_losses(rows).savefig(results / "loss.png")
    for pattern in FIGURES:
        for figure in run.glob(pattern):
            shutil.copy(figure, results)


def sanitize_command(command: str) -> str:
    """Return a command without the paths of the machine that it was typed on; DATA stands for the images."""
    words = [part for word in shlex.split(command) for part in word.split("=", word.startswith("--"))]
    for flag in PRIVATE_FLAGS:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    for flag in PLACEHOLDERS.keys() & set(words):
        words[words.index(flag) + 1] = PLACEHOLDERS[flag]
    return shlex.join(words)


if __name__ == "__main__":
    run_command(main, PublishConfig)
