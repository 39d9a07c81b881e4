"""Experiments: tables that are measured row by row, and trainings that go on where they were interrupted."""

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import tyro

from common.command import check_choice
from common.data import load_splits
from common.evaluation import evaluate
from common.pictures import label_grid
from common.runs import Run, describe_machine, make_folder, read_json, write_atomically
from common.training import TrainConfig, train

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class ExperimentConfig:
    name: tyro.conf.Positional[str]  # which experiment
    time_limit: float = 10.0  # minutes of training of each variant
    num_samples: int = 2000  # measured a row, up to 100 steps a sample; half as many above
    dataset: str = "auto"  # auto (MNIST if it can be had, else drawn digits), mnist or drawn
    data_dir: str | None = None  # the folder above MNIST/raw
    seed: int = 0
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str | None = None  # where NAME.json and NAME.png go; default the lesson's results/

    def samples_at(self, steps):
        return self.num_samples if steps <= 100 else max(2, self.num_samples // 2)


class Experiment:
    """NAME.json, written anew after each row. Called again, it computes only the rows that are missing."""

    def __init__(self, lesson, config):
        self.lesson, self.config = lesson, config
        self.digits, self.held_back = load_splits(config)
        folder = Path(config.out or ROOT / lesson / "results")
        make_folder(folder, "--out")
        self.path = folder / f"{config.name}.json"
        settings = {k: v for k, v in asdict(config).items() if k not in ("data_dir", "device", "out")}
        self.content = {"settings": settings, "machine": describe_machine(), "rows": []}
        if self.path.exists() and read_json(self.path)["settings"] == settings:
            self.content = read_json(self.path)

    def row(self, measure, *args, **key):
        """The row of this key: known already, or `measure(*args)`, a dict of numbers."""
        for row in self.content["rows"]:
            if row.items() >= key.items():
                return row
        started = time.monotonic()
        row = key | measure(*args)
        row["minutes"] = round((time.monotonic() - started) / 60, 2)
        self.content["rows"].append(row)
        text = json.dumps(self.content, indent=1) + "\n"
        write_atomically(self.path, lambda part: part.write_text(text))
        print(row, flush=True)
        return row

    def save(self, figure):
        picture = self.path.with_suffix(".png")
        write_atomically(picture, figure.savefig)
        print(f"look at {picture}; numbers in {self.path.name} beside it")

    def save_rows(self, rows):
        """Save a picture of labelled rows of images. rows: name -> [N, C, H, W], the same N in all."""
        images = list(rows.values())
        self.save(label_grid(torch.cat(images), len(images[0]), row_labels=list(rows), scale=1.2))

    def train(self, variant, network, loss, show=None, **settings):
        """Train for the time limit, in runs/experiments; returns the averaged network.

        show: as `common.training.train` takes it. settings: of TrainConfig.
        """
        config, folder = self.config, Path("runs/experiments") / self.lesson / self.config.name / variant
        settings = {"time_limit": config.time_limit, "seed": config.seed, "device": config.device} | settings
        settings = TrainConfig(out=str(folder), **settings)
        if any(folder.glob("checkpoints/step_*.pt")):
            settings = replace(settings, resume=str(folder))
        run = Run(self.lesson, settings, self.digits.name)
        validation = self.held_back.batch(torch.arange(512))
        return train(network, loss, self.digits, settings, run, validation, show=show)


def quality(samples, reference):
    """The numbers that tables of experiments hold."""
    measured = evaluate(samples, reference)
    return {name: measured[name] for name in ("n", "fid", "fid_floor", "kid", "confident")}


def run_experiment(experiments, config):
    """experiments: name -> function of the configuration."""
    check_choice("experiment", config.name, experiments)
    experiments[config.name](config)
