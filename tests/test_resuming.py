"""What --resume and --checkpoint accept: the same data, finite weights, known settings; what they say."""

import json
import shutil
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.digits.mnist import Digits
from common.errors import UserError
from common.files import read_json
from common.protocols import Model
from common.training.checkpoints import load_model, load_weights, save_weights
from common.training.config import config_from_dict
from common.training.fingerprint import data_fingerprint
from lesson_04_text_conditioning.captioned_mnist import TokenizedDigits, train_tokenizer
from tests import line_run
from tests.conftest import ROOT
from tests.line_run import error_of, run_line
from tests.test_lesson_06_training import FEW, refused, run_in_process, tiny_data  # noqa: F401 (a fixture)


@pytest.fixture
def line(tmp_path, monkeypatch):
    """A run of four steps in the folder run/ of the current folder."""
    monkeypatch.chdir(tmp_path)
    run_line("--steps", 4, "--out", "run", "--batch-size", 8)
    return tmp_path / "run"


# -- what a checkpoint holds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    weights = {"a": torch.ones(3), "b.weight": torch.ones(4, 4), "steps": torch.tensor(7)}
    weights["b.weight"][2, 3] = value
    save_weights(tmp_path / "w.safetensors", weights, {"lesson": "lesson_test"})
    with pytest.raises(UserError, match=r"--checkpoint .*w.safetensors.* not finite .*b\.weight"):
        load_weights(tmp_path / "w.safetensors", "lesson_test")


@pytest.mark.parametrize("part", ["network", "ema", "optimizer"])
def test_a_training_state_that_is_not_finite_is_refused(line, capsys, part):
    path = line / "checkpoints" / "step_0000004.pt"
    state = torch.load(path, weights_only=True)
    moments = state["optimizer"]["state"][0]["exp_avg"] if part == "optimizer" else state[part]["0.weight"]
    moments.view(-1)[1] = float("nan")
    torch.save(state, path)
    assert "not finite" in error_of(capsys, "--resume", "run", "--steps", "6")


def test_a_training_state_of_another_kind_is_refused(line, capsys):
    for content in ([1, 2], {"step": 3}, torch.ones(2)):
        torch.save(content, line / "checkpoints" / "step_0000004.pt")
        assert "--resume" in error_of(capsys, "--resume", "run", "--steps", "6")


def test_weights_that_are_no_longer_finite_are_not_saved(tmp_path, monkeypatch, capsys):
    """The optimizer's last step may break them although loss and gradient were finite."""
    monkeypatch.chdir(tmp_path)

    class Breaks(torch.optim.AdamW):
        def step(self):
            super().step()
            Breaks.steps += 1
            if Breaks.steps == 6:
                self.param_groups[0]["params"][0].data[0] = float("inf")

    Breaks.steps = 0
    monkeypatch.setitem(__import__("common.training.optim", fromlist=["x"]).OPTIMIZERS, "adamw", Breaks)
    with pytest.raises(SystemExit):
        run_line("--steps", 6, "--checkpoint-every", 3, "--out", "run")
    assert "step 6: the weights are not finite" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step*")) == [
        "step_0000003.pt",
        "step_0000003.safetensors",
    ]


@dataclass(frozen=True)
class Settings:
    width: int = 3


def build(metadata):
    settings = config_from_dict(Settings, metadata["network"])
    return Model(nn.Linear(settings.width, 1), None, metadata)


@pytest.mark.parametrize(
    "network, reason",
    [
        ({"width": 3, "registers": 4}, "newer version.*registers"),
        ({"width": "wide"}, "settings"),
        ({"width": {"a": 1}}, "settings"),
        (None, "settings"),
        ([3], "settings"),
    ],
)
def test_settings_of_a_newer_version_are_one_line(tmp_path, network, reason):
    path = tmp_path / "w.safetensors"
    weights = nn.Linear(3, 1).state_dict()
    save_weights(path, weights, {"lesson": "lesson_test", "network": network})
    with pytest.raises(UserError, match=rf"--checkpoint .*w\.safetensors.*{reason}"):
        load_model(path, "lesson_test", build)
    save_weights(path, weights, {"lesson": "lesson_test"})
    with pytest.raises(UserError, match=r"--checkpoint .*w\.safetensors.*'network'"):
        load_model(path, "lesson_test", build)


def test_a_run_of_a_newer_version_is_not_resumed(line, capsys):
    content = read_json(line / "config.json")
    content["config"]["weight_decay"] = 0.1
    (line / "config.json").write_text(json.dumps(content))
    text = error_of(capsys, "--resume", "run", "--steps", "6")
    assert "newer version" in text and "weight_decay" in text


def test_every_pretrained_checkpoint_still_loads():
    found = [p for p in ROOT.glob("lesson_*/pretrained/*.safetensors") if not p.stem.endswith("_classifier")]
    assert len(found) > 5
    for path in found:
        _, metadata = load_weights(path, None)
        assert "lesson" in metadata


# -- the same data -------------------------------------------------------------------------------------------


def digits(seed=0, name="mnist"):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(50, 1, 32, 32, generator=generator) * 2 - 1
    return Digits(name, images, torch.arange(50) % 10)


def test_a_fingerprint_is_of_pixels_and_labels_and_not_of_names():
    assert data_fingerprint(digits()) == data_fingerprint(digits(name="copy of mnist"))
    assert data_fingerprint(digits()) != data_fingerprint(digits(seed=1))
    other = digits()
    other.labels[7] = 3
    assert data_fingerprint(digits()) != data_fingerprint(other)
    one_pixel = digits()
    one_pixel.images[49, 0, 31, 31] += 0.01
    assert data_fingerprint(digits()) != data_fingerprint(one_pixel)
    tokenized = [TokenizedDigits(d, train_tokenizer()) for d in (digits(), digits(name="x"), one_pixel)]
    assert len({data_fingerprint(data) for data in tokenized}) == 2


def test_data_without_arrays_has_no_fingerprint():
    class Generated:
        name, folder = "generated", "/home/me"

        def __len__(self):
            return 3

        def batch(self, indices):
            return (torch.randn(len(indices), 1),)

    assert data_fingerprint(Generated()) is None


def test_other_points_of_the_same_number_are_refused(line, capsys, monkeypatch):
    before = (line / "config.json").read_text()
    monkeypatch.setattr(line_run.Line, "name", "a new name")
    run_line("--resume", "run", "--steps", 5)
    init = line_run.Line.__init__

    def shifted(self):
        init(self)
        self.x[9] += 0.5

    monkeypatch.setattr(line_run.Line, "__init__", shifted)
    before = (line / "config.json").read_text()
    text = error_of(capsys, "--resume", "run", "--steps", 6)
    assert text.startswith("error: --resume run was trained on a new name, the data now is a new name; the ")
    assert (line / "config.json").read_text() == before


def test_a_run_that_is_older_than_fingerprints_goes_by_the_name(line, capsys, monkeypatch):
    content = read_json(line / "config.json")
    del content["fingerprint"]
    (line / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(line_run.Line, "name", "other")
    assert "was trained on line, the data now is other" in error_of(capsys, "--resume", "run", "--steps", 6)
    monkeypatch.undo()
    monkeypatch.chdir(line.parent)
    run_line("--resume", "run", "--steps", 6)


def test_lesson_6_goes_by_photos_and_captions(tiny_data, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tiny_data)
    run_in_process(*FEW, "--out", "run")
    config = (tiny_data / "run" / "config.json").read_text()
    shutil.copytree("data", "photos")
    shutil.copytree("data", "captions")
    pixels = np.random.default_rng(99).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save("photos/05.png")
    (tiny_data / "captions" / "05.txt").write_text("number nine")
    for folder in ("photos", "captions"):
        text = refused(capsys, "--resume", "run", "--steps", "5", "--data-dir", folder)
        assert "--resume run was trained on data" in text and "images or captions are not the same" in text
    assert "--validation-fraction was" in refused(
        capsys, "--resume", "run", "--steps", "5", "--validation-fraction", "0.3"
    )
    assert (tiny_data / "run" / "config.json").read_text() == config
    (tiny_data / "data").rename("renamed")
    run_in_process("--resume", "run", "--steps", "5", "--data-dir", "renamed")
    assert read_json(tiny_data / "run" / "config.json")["data"].startswith("renamed")


def test_an_error_of_resume_names_resume(tiny_data, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tiny_data)
    run_in_process(*FEW, "--out", "run")
    (weights,) = (tiny_data / "run" / "checkpoints").glob("step_0000004.safetensors")
    weights.write_bytes(b"nothing")
    text = refused(capsys, "--resume", "run", "--steps", "5")
    assert "--resume" in text and "--checkpoint" not in text
    weights.unlink()
    text = refused(capsys, "--resume", "run", "--steps", "5")
    assert "--resume" in text and "--checkpoint" not in text


# -- other settings ------------------------------------------------------------------------------------------


def test_changed_settings_are_said_in_one_line(line, capsys):
    flags = ["--steps", 6, "--learning-rate", 0.01, "--seed", 3, "--batch-size", 4]
    run_line("--resume", "run", *flags)
    (said,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("resume: ")]
    for change in ("--steps was 4, now 6", "--learning-rate was 0.0007, now 0.01", "--seed was 0, now 3"):
        assert change in said
    assert "--batch-size was 8, now 4" in said and "bit for bit" in said
    run_line("--resume", "run", "--steps", 8, "--seed", 3)
    (said,) = [text for text in capsys.readouterr().out.splitlines() if text.startswith("resume: ")]
    assert said == "resume: --steps was 6, now 8"
    run_line("--resume", "run")
    assert "resume: " not in capsys.readouterr().out


@pytest.mark.parametrize("before, after", [("adamw", "muon"), ("muon", "adamw")])
def test_another_optimizer_is_refused(tmp_path, monkeypatch, capsys, before, after):
    monkeypatch.chdir(tmp_path)
    run_line("--steps", 3, "--out", "run", "--optimizer", before)
    text = error_of(capsys, "--resume", "run", "--steps", 4, "--optimizer", after)
    assert text == f"error: --resume run: --optimizer was {before} and cannot change"


def test_another_number_of_processes_is_said(line, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    run_line("--resume", "run", "--steps", 5)
    assert "1 process, now 2" in capsys.readouterr().out
