"""Every experiment runs, writes its table and its picture, and computes no row twice."""

import importlib
import json
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from common.command import UserError, run_command
from common.experiments import Experiment, ExperimentConfig, cross_table_of, run_experiment, table_of
from common.runs import read_metrics
from common.sampling import load_network
from tests.conftest import ROOT

LESSONS = sorted(path.parent.name for path in ROOT.glob("lesson_*/experiments.py"))
MODULES = [importlib.import_module(f"{lesson}.experiments") for lesson in LESSONS]
PARTS = ("shapes", "editing", "clip")  # of lesson 6's experiments, each in a file of its own
FILES = MODULES + [importlib.import_module(f"lesson_06_miniglide.{part}_experiments") for part in PARTS]
ALL = [(module, name) for module in MODULES for name in module.EXPERIMENTS]
OPTIMIZERS = {  # with which their tables in results/ were made
    "ablation": {"muon"},
    "classifier_guidance": {"adamw"},
    "readers": {"muon"},
    "time_to_quality": {"adamw", "muon"},
    "retrieval": {"adamw"},
    "retrieval_of_shapes": {"adamw"},
}
SMALL = ["--dataset", "drawn", "--num-samples", "2", "--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def little_data(monkeypatch, tmp_path):
    train = Experiment.train

    def train_a_little(*args, **settings):
        return train(*args, **(settings | {"batch_size": 8}))

    monkeypatch.setattr("common.data.NUM_DRAWN", 3000)
    monkeypatch.setattr(Experiment, "validated", 8)
    monkeypatch.setattr(Experiment, "train", train_a_little)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def networks_are_moved_to_the_device(monkeypatch):
    """A shipped network that stays on the CPU fails only where there is a GPU."""

    def load(checkpoint, lesson, rebuild, device):
        return load_network(checkpoint, lesson, rebuild, device)

    for file in FILES:
        if hasattr(file, "load_network"):
            monkeypatch.setattr(file, "load_network", load)


def run(module, *flags):
    run_command(lambda config: run_experiment(module.EXPERIMENTS, config), module.Config, argv=[*flags])


@pytest.mark.parametrize("module, name", ALL, ids=[f"{m.__name__.split('.')[0]}-{name}" for m, name in ALL])
def test_an_experiment_writes_rows_and_a_picture(module, name, tmp_path, monkeypatch):
    for constant, small in {
        "STEPS": (2, 3),
        "SHOWN_STEPS": 2,
        "BATCHES": 2,
        "HISTORY": 1,
        "TIMED": 2,
        "SCALES": (0, 2),
        "NUM_DRAWN": 100,
        "LEVELS": (0, 200),
        "TIMES": (2,),
        "BUDGETS": (1, 2),
        "CLIP_SCALES": (0, 10),
        "FREE_SCALES": (2,),
        "NOISE": (0, 500),
    }.items():
        for file in FILES:
            if hasattr(file, constant):
                monkeypatch.setattr(file, constant, small)
    run(module, name, *SMALL, "--out", str(tmp_path))
    content = json.loads((tmp_path / f"{name}.json").read_text())
    assert content["settings"]["num_samples"] == 2 and content["machine"]["torch"] and content["rows"]
    assert all("minutes" in row for row in content["rows"])
    assert Image.open(tmp_path / f"{name}.png").size[0] > 100
    trainings = [json.loads(path.read_text()) for path in tmp_path.glob("runs/**/config.json")]
    if name in OPTIMIZERS:
        assert {training["config"]["optimizer"] for training in trainings} == OPTIMIZERS[name]


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    config, calls = ExperimentConfig("x", dataset="drawn", out=str(tmp_path)), []

    def measure(value):
        calls.append(value)
        return {"value": value}

    Experiment("lesson_test", config).row(measure, 1, variant="a")
    again = Experiment("lesson_test", config)
    assert again.row(measure, 2, variant="a")["value"] == 1
    assert again.row(measure, 3, variant="b")["value"] == 3
    assert calls == [1, 3]
    other_seed = ExperimentConfig("x", dataset="drawn", seed=1, out=str(tmp_path))
    assert Experiment("lesson_test", other_seed).row(measure, 4, variant="a")["value"] == 4
    with pytest.raises(UserError, match="other settings"):
        Experiment("lesson_test", replace(config, num_samples=3))


def test_a_training_killed_before_its_first_checkpoint_begins_anew(tmp_path):
    config = ExperimentConfig("x", dataset="drawn", steps=1, device="cpu", out=str(tmp_path))
    experiment = Experiment("lesson_test", config)
    folder = experiment.folder_of("a")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.csv").write_text("step,loss\n1,")
    experiment.train("a", torch.nn.Linear(1, 1), lambda network, x_0, _: network(x_0[:, 0, :1, 0]).square())
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == [1]


def train_on_a_pixel(steps, out):
    config = ExperimentConfig("x", dataset="drawn", steps=steps, device="cpu", out=str(out))
    loss = lambda network, x_0, _: network(x_0[:, 0, :1, 0]).square()  # noqa: E731
    Experiment("lesson_test", config).train("a", torch.nn.Linear(1, 1), loss)


def test_a_training_of_other_settings_is_not_taken_for_this_one(tmp_path):
    train_on_a_pixel(2, tmp_path / "first")
    train_on_a_pixel(2, tmp_path / "again")  # finished: nothing to do
    train_on_a_pixel(3, tmp_path / "other")  # its steps are its own
    files = Path("runs/experiments/lesson_test").glob("*/a/metrics.csv")
    assert sorted(len(read_metrics(file)) for file in files) == [2, 3]
    for file in Path("runs").glob("**/config.json"):
        file.write_text(file.read_text().replace('"data": "drawn"', '"data": "mnist"'))
    with pytest.raises(UserError, match="data was mnist, is drawn"):
        train_on_a_pixel(2, tmp_path / "first")


def test_two_seeds_at_once_keep_each_others_rows(tmp_path):
    config = ExperimentConfig("x", dataset="drawn", out=str(tmp_path))
    both = [Experiment("lesson_test", replace(config, seed=seed)) for seed in (0, 1)]
    for experiment in both:
        experiment.row(lambda: {"value": 1}, variant="a")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [0, 1]


def test_of_a_stopped_training_each_moment_is_measured_under_its_own_step(tmp_path, monkeypatch):
    """Stopped between two checkpoints it saves one more, which is none of the moments."""
    lesson_1 = MODULES[0]
    config = lesson_1.Config("along_training", dataset="drawn", steps=4, num_samples=2, device="cpu")
    train, seen = Experiment.train, []

    def every_second(*args, **settings):
        return train(*args, **(settings | {"checkpoint_every": 2}))

    def loss(network, x_0, label):
        if torch.is_grad_enabled():
            seen.append(0)
            if len(seen) == 3:
                signal.raise_signal(signal.SIGINT)
        return (network(x_0, label) - 1).square().flatten(1).mean(1)

    monkeypatch.setattr(Experiment, "train", every_second)
    monkeypatch.setattr(lesson_1, "loss_simple", loss)
    monkeypatch.setattr(lesson_1, "SHOWN_STEPS", 2)
    with pytest.raises(SystemExit):
        lesson_1.along_training(replace(config, out=str(tmp_path)))
    lesson_1.along_training(replace(config, out=str(tmp_path)))
    rows = json.loads((tmp_path / "along_training.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [2, 4]


def test_tables_of_results_are_aligned(tmp_path):
    rows = [
        {"decay": 0.5, "n": 2000, "fid": 12.3456, "seed": 0},
        {"decay": None, "n": 2, "fid": 1.0, "seed": 0},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    assert table_of(tmp_path / "x.json") == "decay     n   fid\n  0.5  2000  12.3\n    -     2     1"
    assert table_of(tmp_path / "x.json", "n") == "   n\n2000\n   2"


def test_cross_tables_have_a_line_and_a_column_for_each_value(tmp_path):
    rows = [
        {"steps": s, "by": by, "fid": fid} for s, by, fid in ((5, "a", 1.5), (5, "b", 20.25), (10, "b", 3.0))
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    table = cross_table_of(tmp_path / "x.json", "steps", "by", "fid")
    assert table == "steps    a     b\n    5  1.5  20.2\n   10    -     3"


def test_an_unknown_experiment_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        run(MODULES[0], "nothing")
    assert "nothing is unknown; choose variances" in capsys.readouterr().err
