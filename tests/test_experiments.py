"""Every experiment runs, writes its table and its figure, and measures no row twice."""

import importlib
import json
import re
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from common.cli import run_command
from common.device import pick_device
from common.digits.mnist import load_splits
from common.errors import UserError
from common.results import experiments
from common.results.experiments import (
    ExperimentConfig,
    by_name,
    open_table,
    run_experiment,
    run_folder,
    train_variant,
    with_default_steps,
)
from common.results.table import pivot_table, read_table
from common.training.metrics_csv import read_metrics
from tests.conftest import ROOT

LESSONS = sorted(path.parent.name for path in ROOT.glob("lesson_*/experiments.py"))
MODULES = [importlib.import_module(f"{lesson}.experiments") for lesson in LESSONS]
ALL = [(module, name) for module in MODULES for name in module.EXPERIMENTS]
IDS = [f"{module.__name__.split('.')[0]}-{name}" for module, name in ALL]
OPTIMIZERS = {  # with which the tables in results/ were made
    "ablation": {"muon"},
    "classifier_guidance": {"adamw"},
    "readers": {"muon"},
    "time_to_quality": {"adamw", "muon"},
    "retrieval": {"adamw"},
    "retrieval_of_shapes": {"adamw"},
}
SMALL_CONSTANTS = {
    "STEPS": (2, 3),
    "SHOWN_STEPS": 2,
    "SAMPLING_STEPS": 2,
    "BATCHES": 2,
    "HISTORY": 1,
    "TIMED": 2,
    "SCALES": (0, 2),
    "NUM_SHAPES": 100,
    "NOISE_LEVELS": (0, 200),
    "NUM_RESAMPLES": (2,),
    "BUDGETS": (1, 2),
    "CLIP_SCALES": (0, 10),
    "CFG_SCALES": (2,),
    "TIMESTEPS": (0, 500),
}
DEVICE = "cpu:0"  # another name of the CPU, to see whether the flag is passed on
SMALL = ["--dataset", "synthetic", "--num-samples", "2", "--steps", "2", "--device", DEVICE]


@pytest.fixture(autouse=True)
def little_data_and_training(monkeypatch, tmp_path):
    train = experiments.train

    def train_a_little(network, loss, data, config, *, validation, **kwargs):
        validation = tuple(x[:8] for x in validation)
        return train(network, loss, data, replace(config, batch_size=8), validation=validation, **kwargs)

    monkeypatch.setattr(experiments, "train", train_a_little)
    monkeypatch.setattr("common.digits.mnist.NUM_SYNTHETIC", 3000)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def pretrained_networks_are_on_the_device(monkeypatch):
    """A pretrained network that stays on the CPU would fail only where there is a GPU."""

    def pick(device):
        assert device == DEVICE
        return pick_device(device)

    monkeypatch.setattr("common.training.checkpoints.pick_device", pick)


def run(module, *flags):
    run_command(partial(run_experiment, module.EXPERIMENTS), module.Config, argv=[*flags])


def study_modules():
    """The modules of experiments, and those from which they take settings."""
    parts = (".experiments", "_study", ".captioned_shapes")
    return [m for name, m in sys.modules.items() if name.startswith("lesson_") and name.endswith(parts)]


@pytest.mark.parametrize("module, name", ALL, ids=IDS)
@pytest.mark.usefixtures("pretrained_networks_are_on_the_device")
def test_an_experiment_writes_rows_and_a_figure(module, name, tmp_path, monkeypatch):
    for constant, small in SMALL_CONSTANTS.items():
        for file in study_modules():
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


@pytest.mark.parametrize("module", MODULES, ids=LESSONS)
def test_the_help_names_every_experiment_and_stored_tables_belong_to_one(module):
    assert all(re.search(rf"\b{name}\b", module.__doc__) for name in module.EXPERIMENTS)
    for path in (Path(module.__file__).parent / "results").glob("*.json"):
        if "settings" in (content := json.loads(path.read_text())) and "name" in content["settings"]:
            assert content["settings"]["name"] == path.stem and path.stem in module.EXPERIMENTS


# -- tables --------------------------------------------------------------------------------------------------


def test_rows_that_are_there_are_not_measured_again(tmp_path):
    config, calls = ExperimentConfig("x", dataset="synthetic", out=str(tmp_path)), []

    def measure(value):
        calls.append(value)
        return {"value": value}

    open_table("lesson_test", config).row(partial(measure, 1), variant="a")
    again = open_table("lesson_test", config)
    assert again.row(partial(measure, 2), variant="a")["value"] == 1
    assert again.row(partial(measure, 3), variant="b")["value"] == 3
    assert calls == [1, 3]
    other_seed = open_table("lesson_test", replace(config, seed=1))
    assert other_seed.row(partial(measure, 4), variant="a")["value"] == 4
    with pytest.raises(UserError, match="other settings"):
        open_table("lesson_test", replace(config, num_samples=3))


def test_a_table_of_other_weights_is_refused(tmp_path, monkeypatch):
    config = ExperimentConfig("x", dataset="synthetic", out=str(tmp_path))
    file = tmp_path / "pretrained.safetensors"
    monkeypatch.setattr(experiments, "pretrained_path", lambda lesson: file)
    file.write_bytes(b"first")
    open_table("lesson_test", config, weights_of="lesson_test").row(lambda: {"value": 1}, variant="a")
    assert len(open_table("lesson_test", config, weights_of="lesson_test").rows) == 1
    file.write_bytes(b"second")
    with pytest.raises(UserError, match=r"other settings \(weights was"):
        open_table("lesson_test", config, weights_of="lesson_test")


def test_two_seeds_at_once_keep_each_others_rows(tmp_path):
    config = ExperimentConfig("x", dataset="synthetic", out=str(tmp_path))
    both = [open_table("lesson_test", replace(config, seed=seed)) for seed in (0, 1)]
    for table in both:
        table.row(lambda: {"value": 1}, variant="a")
    rows = json.loads((tmp_path / "x.json").read_text())["rows"]
    assert [row["seed"] for row in rows] == [0, 1]


def test_steps_and_samples_have_defaults():
    config = ExperimentConfig("x")
    assert with_default_steps(config).steps == 4000 and with_default_steps(config, 1000).steps == 1000
    assert with_default_steps(replace(config, steps=7), 1000).steps == 7
    assert [config.samples_at(steps) for steps in (5, 100, 101)] == [2000, 2000, 1000]
    assert replace(config, num_samples=2).samples_at(1000) == 2  # one sample has no spread


# -- training ------------------------------------------------------------------------------------------------


def pixel_loss(network, x_0, label):
    return network(x_0[:, 0, :1, 0]).square()[:, 0]


def train_on_a_pixel(config):
    digits, validation_digits = load_splits(config.dataset)
    validation = validation_digits.batch(torch.arange(8))
    network = nn.Linear(1, 1)
    return train_variant("lesson_test", config, "a", network, pixel_loss, digits, validation)


def test_a_training_killed_before_its_first_checkpoint_starts_again(tmp_path):
    config = ExperimentConfig("x", dataset="synthetic", steps=1, device="cpu", out=str(tmp_path))
    folder = run_folder("lesson_test", config, "a")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "metrics.csv").write_text("step,loss\n1,")
    train_on_a_pixel(config)
    assert [row["step"] for row in read_metrics(folder / "metrics.csv")] == [1]


def test_a_training_of_other_settings_is_not_taken_for_this_one(tmp_path):
    config = ExperimentConfig("x", dataset="synthetic", steps=2, device="cpu", out=str(tmp_path))
    train_on_a_pixel(config)
    train_on_a_pixel(config)  # finished: nothing to do
    train_on_a_pixel(replace(config, steps=3))  # its steps are its own
    files = Path("runs/experiments/lesson_test").glob("*/a/metrics.csv")
    assert sorted(len(read_metrics(file)) for file in files) == [2, 3]
    for file in Path("runs").glob("**/config.json"):
        file.write_text(file.read_text().replace('"data": "synthetic"', '"data": "mnist"'))
    with pytest.raises(UserError, match="data was mnist, is synthetic"):
        train_on_a_pixel(config)


def test_the_moments_of_an_interrupted_training_are_measured_at_their_own_steps(tmp_path, monkeypatch):
    """Stopped between two checkpoints it saves one more, which is none of the moments."""
    lesson_1 = MODULES[0]
    config = lesson_1.Config("along_training", dataset="synthetic", steps=4, num_samples=2, device="cpu")
    train, seen = experiments.train, []

    def save_every_second(network, loss, data, config, **kwargs):
        return train(network, loss, data, replace(config, checkpoint_every=2), **kwargs)

    def loss(network, x_0, label):
        if torch.is_grad_enabled():
            seen.append(0)
            if len(seen) == 3:
                signal.raise_signal(signal.SIGINT)
        return (network(x_0, label) - 1).square().flatten(1).mean(1)

    monkeypatch.setattr(experiments, "train", save_every_second)
    monkeypatch.setattr(lesson_1, "make_loss", lambda: loss)
    monkeypatch.setattr(lesson_1, "SHOWN_STEPS", 2)
    with pytest.raises(SystemExit):
        lesson_1.along_training(replace(config, out=str(tmp_path)))
    lesson_1.along_training(replace(config, out=str(tmp_path)))
    rows = json.loads((tmp_path / "along_training.json").read_text())["rows"]
    assert [row["step"] for row in rows] == [2, 4]


# -- texts ---------------------------------------------------------------------------------------------------


def test_tables_of_results_are_aligned(tmp_path):
    rows = [
        {"decay": 0.5, "n": 2000, "fid": 12.3456, "seed": 0},
        {"decay": None, "n": 2, "fid": 1.0, "seed": 0},
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    assert read_table(tmp_path / "x.json") == "decay    n  fid\n  0.5 2000 12.3\n    -    2    1"
    assert read_table(tmp_path / "x.json", "n") == "   n\n2000\n   2"


def test_pivot_tables_have_a_line_and_a_column_for_each_value(tmp_path):
    rows = [
        {"steps": s, "by": by, "fid": fid} for s, by, fid in ((5, "a", 1.5), (5, "b", 20.25), (10, "b", 3.0))
    ]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    table = pivot_table(tmp_path / "x.json", "steps", "by", "fid")
    assert table == "steps   a    b\n    5 1.5 20.2\n   10   -    3"


def test_an_unknown_experiment_is_named(capsys):
    with pytest.raises(SystemExit, match="2"):
        run(MODULES[0], "nothing")
    assert "nothing is unknown; choose variances" in capsys.readouterr().err


def test_whole_numbers_among_others_stay_whole(tmp_path):
    rows = [{"scale": s, "by": "a", "fid": 2.0} for s in (0, 1.5, 20)]
    (tmp_path / "x.json").write_text(json.dumps({"rows": rows}))
    lines = pivot_table(tmp_path / "x.json", "scale", "by", "fid").splitlines()
    assert [line.split() for line in lines] == [["scale", "a"], ["0", "2"], ["1.5", "2"], ["20", "2"]]


def test_experiments_are_named_like_their_functions():
    def first(config):
        pass

    assert by_name([first]) == {"first": first}
