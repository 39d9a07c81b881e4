"""Experiments: tables that are measured row by row, and trainings that go on where they were interrupted."""

import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from hashlib import sha256
from pathlib import Path

import torch
import tyro

from common.command import UserError, check_choice
from common.data import load_splits
from common.evaluation import evaluate
from common.pictures import curves, label_grid
from common.runs import (
    ROOT,
    Run,
    describe_machine,
    make_folder,
    read_json,
    read_metrics,
    shipped_weights,
    write_atomically,
    write_json,
)
from common.training import TrainConfig, train


@dataclass(frozen=True)
class ExperimentConfig:
    name: tyro.conf.Positional[str]  # which of the experiments above
    steps: int | None = None  # each variant is trained; default 4000 (10 minutes); some 1000 to 2000
    num_samples: int = 2000  # measured a row, up to 100 steps a sample; half as many above
    dataset: str = "auto"  # auto (MNIST if it can be had, else drawn digits), mnist or drawn
    data_dir: str | None = None  # the folder above MNIST/raw
    seed: int = 0  # another seed adds rows to the same table
    device: str = "auto"  # auto, cpu, cuda, mps
    out: str | None = None  # where NAME.json and NAME.png go; default the lesson's results/

    def samples_at(self, steps):
        return self.num_samples if steps <= 100 else max(2, self.num_samples // 2)


class Experiment:
    """NAME.json, written anew after each row. Called again, it computes only the rows that are missing.

    steps: of training, if config names none. weights_of: the lesson whose shipped weights are measured.
    trainings: the name under which experiments share their trainings, if they do.
    Raises UserError if there is a table of other settings or weights, which would be lost.
    """

    validated = 512  # held-back images for the validation loss

    def __init__(self, lesson, config, steps=4000, weights_of=None, trainings=None):
        self.lesson, self.config = lesson, replace(config, steps=config.steps or steps)
        self.trainings = f"{trainings or config.name}_steps{self.config.steps}_seed{config.seed}"
        folder = Path(config.out or ROOT / lesson / "results")
        make_folder(folder, "--out")
        self.path = folder / f"{config.name}.json"
        free = ("seed", "data_dir", "device", "out")
        settings = {k: v for k, v in asdict(self.config).items() if k not in free}
        if weights_of:
            settings["weights"] = sha256(shipped_weights(weights_of).read_bytes()).hexdigest()[:16]
        if config.num_samples < 2:
            raise UserError(f"--num-samples is {config.num_samples}; there is no spread in fewer than 2")
        self.content = {"settings": settings, "machine": describe_machine(config.device), "rows": []}
        if self.path.exists():
            self.content = read_json(self.path)
            if change := difference(self.content.get("settings", {}), settings):
                raise UserError(f"{self.path} is of other settings ({change}); name another --out")

    @cached_property
    def splits(self):
        return load_splits(self.config)

    @property
    def digits(self):
        return self.splits[0]

    @property
    def held_back(self):
        return self.splits[1]

    def row(self, measure, *args, **key):
        """The row of this key and seed: known already, or `measure(*args)`, a dict of numbers."""
        key["seed"] = self.config.seed
        for row in self.content["rows"]:
            if row.items() >= key.items():
                return row
        started = time.monotonic()
        row = key | measure(*args)
        row["minutes"] = round((time.monotonic() - started) / 60, 2)
        if self.path.exists():  # another seed may have added rows meanwhile
            self.content = read_json(self.path)
        self.content["rows"].append(row)
        write_json(self.path, self.content)
        print(row, flush=True)
        return row

    def save(self, figure, ending=""):
        """NAME.png, or with an ending such as _loss another picture beside it."""
        picture = self.path.with_name(f"{self.config.name}{ending}.png")
        write_atomically(picture, figure.savefig)
        print(f"look at {picture}; numbers in {self.path.name} beside it")

    def save_losses(self, variants):
        """Save NAME_loss.png: the training losses of the variants, means of 50 steps."""
        lines = {}
        for variant in variants:
            rows = read_metrics(self.folder_of(variant) / "metrics.csv")
            groups = [rows[i : i + 50] for i in range(0, len(rows), 50)]
            lines[variant] = [(g[-1]["step"], sum(row["loss"] for row in g) / len(g)) for g in groups]
        self.save(curves(lines, "step", "loss"), "_loss")

    def save_rows(self, rows, ending="", scale=1.2, **labels):
        """Save a picture of labelled rows of images. rows: name -> [N, C, H, W], the same N in all."""
        images = list(rows.values())
        grid = label_grid(torch.cat(images), len(images[0]), row_labels=list(rows), scale=scale, **labels)
        self.save(grid, ending)

    def folder_of(self, variant=""):
        """The run of a variant, or where those of all are."""
        return Path("runs/experiments") / self.lesson / self.trainings / variant

    def has_begun(self, variant):
        """Whether there is a checkpoint, with which its training goes on."""
        return any(self.folder_of(variant).glob("checkpoints/step_*.pt"))

    def train(
        self, variant, network, loss, show=None, data=None, metadata=None, kind=TrainConfig, **settings
    ):
        """Train for the steps of this experiment, in runs/experiments; returns the averaged network.

        show, metadata: as `common.training.train` takes them. data: a data set to train on and a batch to
        validate with, if not plain digits. settings: of a configuration of this kind.
        """
        config, folder = self.config, self.folder_of(variant)
        data, validation = data or (self.digits, self.held_back.batch(torch.arange(self.validated)))
        settings = {"steps": config.steps, "seed": config.seed, "device": config.device} | settings
        settings = kind(out=str(folder), **settings)
        if self.has_begun(variant):
            refuse_other_settings(folder, settings, data)
            settings = replace(settings, resume=str(folder))
        run = Run(self.lesson, settings, data.name, again="the same command again")
        return train(network, loss, data, settings, run, validation, metadata, show)


def difference(before, now):
    """What two settings (dicts) differ in, in words; "" if in nothing that both have."""
    changes = (name for name in sorted(before.keys() & now.keys()) if before[name] != now[name])
    return ", ".join(f"{name} was {before[name]}, is {now[name]}" for name in changes)


def refuse_other_settings(folder, settings, data):
    """A training goes on, or is taken for finished, only if it is the one that is asked for."""
    now = json.loads(json.dumps(asdict(settings) | {"data": data.name}))  # tuples as JSON has them
    for free in ("device", "out", "resume", "data_dir", "cache_dir"):
        now.pop(free, None)
    saved = read_json(folder / "config.json")
    if change := difference(saved["config"] | {"data": saved["data"]}, now):
        raise UserError(f"{folder} holds a training of other settings ({change}); move it away")


def quality(samples, reference, digits=None, colours=None):
    """The numbers that tables of experiments hold. digits, colours: what was asked for, if anything was."""
    measured = evaluate(samples, reference, digits, colours)
    left_out = ("reference", "confident_real") + (("diversity",) if digits is None else ())
    return {name: value for name, value in measured.items() if name not in left_out}


def table_of(path, *columns):
    """The rows of a NAME.json as a text with aligned columns; all columns, or those that are named."""
    rows = read_json(path)["rows"]
    return as_table(rows, columns or [name for name in rows[0] if name not in ("seed", "minutes")])


def as_table(rows, columns):
    """The columns of rows, dicts that need not have them all, as a text."""
    return aligned([columns, *([row.get(name) for name in columns] for row in rows)])


def cross_table_of(path, down, across, value):
    """One number of a NAME.json: a line for each value of `down`, a column for each value of `across`."""
    numbers = {(row[down], row[across]): row[value] for row in read_json(path)["rows"]}
    lines, columns = ({key[i]: None for key in numbers} for i in (0, 1))  # each once, in their order
    cells = [[line, *(numbers.get((line, column)) for column in columns)] for line in lines]
    return aligned([[down, *columns], *cells])


def aligned(table):
    def text(value):
        return "-" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)

    cells = [[text(value) for value in line] for line in table]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(text.rjust(width) for text, width in zip(line, widths)) for line in cells)


def run_experiment(experiments, config):
    """experiments: name -> function of the configuration."""
    check_choice("experiment", config.name, experiments)
    experiments[config.name](config)
