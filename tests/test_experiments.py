"""Every experiment runs, writes its table and its picture, and computes no row twice."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from common.command import UserError, run_command
from common.experiments import Experiment, ExperimentConfig, cross_table_of, run_experiment, table_of
from common.runs import read_metrics
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
