"""The scripts as a person calls them: dry runs, samples in every format, and one line for wrong input."""

import importlib
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch
import tyro
from PIL import Image

from common.cli import run_command
from common.digits.classifier import load_digit_classifier
from common.digits.evaluation import fid_to_reference, max_channel, mnist_reference
from common.images import to_tensor
from common.training.checkpoints import load_weights, save_weights
from common.training.run_dir import saved_config
from lesson_04_text_conditioning.prompts import grid_layout
from tests.conftest import ROOT

LESSONS = sorted(path.parent.name for path in ROOT.glob("lesson_0*/train_mnist.py"))
TEXT_LESSONS = LESSONS[3:]


def script(lesson, name):
    return importlib.import_module(f"{lesson}.{name}")


def train(lesson, *flags):
    module = script(lesson, "train_mnist")
    run_command(module.main, module.Config, saved_config, argv=[*flags])


def sample(lesson, *flags):
    module = script(lesson, "sample")
    run_command(module.main, module.Config, argv=[*flags])


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A dry run of every lesson, on synthetic digits."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("common.digits.mnist.NUM_SYNTHETIC", 3000)
        patch.chdir(folder)
        for lesson in LESSONS:
            small = ["--dataset", "synthetic", "--dry-run", "--batch-size", "8", "--device", "cpu"]
            train(lesson, *small, "--out", lesson)
    return folder


@pytest.mark.parametrize("lesson", LESSONS)
def test_dry_run_does_everything(runs, lesson):
    run = runs / lesson
    config = json.loads((run / "config.json").read_text())
    assert config["data"] == "synthetic" and config["lesson"] == lesson and config["config"]["dry_run"]
    assert (run / "metrics.csv").read_text().count("\n") == 3  # a heading and two steps
    metrics = json.loads((run / "metrics.json").read_text(), parse_constant=pytest.fail)
    rows = metrics.get("sweep", [metrics])
    assert all(row["n"] >= 2 and "fid_floor" in row for row in rows)
    if lesson == "lesson_05_cfg":
        assert [row["guidance_scale"] for row in rows] == [0, 1, 2, 3, 4, 7, 10, 20]
    for image in [run / "loss.png", *run.glob("s*.png"), *run.glob("samples/*.png")]:
        assert Image.open(image).size[0] > 100
    assert len(list(run.glob("samples/*.png"))) == 1 and len(list(run.glob("s*.png"))) == 1
    _, metadata = load_weights(run, lesson)
    assert metadata["step"] == 2 and metadata["network"]


@pytest.mark.parametrize("lesson", LESSONS)
def test_sample_needs_nothing_but_the_checkpoint(runs, lesson, tmp_path):
    out = tmp_path / "samples.npz"
    n = ["--prompt", "a red seven", "--prompt", "a 2"] * (lesson in TEXT_LESSONS)
    flags = ["--checkpoint", str(runs / lesson), "--num-samples", "3", "--steps", "2", *n]
    sample(lesson, *flags, "--out", str(out))
    with np.load(out) as file:
        images, prompts = file["images"], file["prompts"].tolist()
    count, channels = (6, 3) if lesson in TEXT_LESSONS else (3, 1)
    assert images.shape == (count, 32, 32, channels) and images.dtype == np.uint8
    assert len(prompts) == count
    if lesson in TEXT_LESSONS:
        assert prompts == ["a red seven"] * 3 + ["a 2"] * 3
    for suffix in ("png", "gif"):
        path = tmp_path / f"samples.{suffix}"
        sample(lesson, *flags, "--out", str(path))
        assert Image.open(path).format == suffix.upper()
    sample(lesson, *flags, "--out", str(tmp_path / "folder"))
    rows = [json.loads(line) for line in (tmp_path / "folder" / "metadata.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == prompts
    again = [np.asarray(Image.open(tmp_path / "folder" / row["file_name"])) for row in rows]
    assert np.array_equal(np.stack(again).reshape(images.shape), images)
    names = ["folder", "samples.gif", "samples.npz", "samples.png"]
    assert sorted(p.name for p in tmp_path.iterdir()) == names


def test_samples_are_reproducible_and_follow_the_seed(runs, tmp_path):
    def images(name, *flags):
        path = tmp_path / f"{name}.npz"
        flags = ["--checkpoint", str(runs / "lesson_05_cfg"), "--steps", "2", "--out", str(path), *flags]
        sample("lesson_05_cfg", "--prompt", "a 3", *flags)
        with np.load(path) as file:
            return file["images"]

    assert np.array_equal(images("a"), images("b"))
    assert not np.array_equal(images("a"), images("c", "--seed", "1"))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_every_sampler_of_lesson_5_with_a_prompts_file(runs, sampler, tmp_path):
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out.npz"
    prompts.write_text("a red seven\n\nthe digit 2 in blue\n")
    flags = ["--prompts-file", str(prompts), "--sampler", sampler, "--steps", "3", "--guidance-scale", "2.5"]
    sample("lesson_05_cfg", "--checkpoint", str(runs / "lesson_05_cfg"), *flags, "--out", str(out))
    with np.load(out) as file:
        assert file["prompts"].tolist() == ["a red seven", "the digit 2 in blue"]


def test_a_long_prompt_is_truncated_with_a_message(runs, tmp_path, capsys):
    flags = ["--checkpoint", str(runs / "lesson_05_cfg"), "--steps", "1", "--out", str(tmp_path / "a.png")]
    sample("lesson_05_cfg", *flags, "--prompt", "a photograph of a red seven on a black ground")
    assert "truncated:" in capsys.readouterr().out


@pytest.mark.parametrize("lesson", LESSONS)
def test_pretrained_weights_draw_digits(lesson, tmp_path):
    if not (ROOT / lesson / "pretrained" / f"{lesson}.safetensors").exists():
        pytest.skip(f"{lesson} has no pretrained weights yet")
    out = tmp_path / "samples.npz"
    few = ["--steps", "50"] if lesson != "lesson_05_cfg" else []
    number = ["--num-samples", "40", *["--prompt", "a 7"] * (lesson in TEXT_LESSONS)]
    sample(lesson, *few, *number, "--out", str(out))
    with np.load(out) as file:
        images = to_tensor(file["images"])
    features, probabilities = load_digit_classifier().predict(max_channel(images))
    confidence, digit = probabilities.max(-1)
    assert (confidence > 0.9).sum() >= 10  # which is true of noise, too
    if lesson in TEXT_LESSONS:
        assert (digit == 7).sum() >= (36 if lesson == "lesson_05_cfg" else 28)
    else:
        assert fid_to_reference(features, mnist_reference()) < 60  # of as much noise, or black: over 300
    if lesson == "lesson_03_adm":
        assert (digit == torch.arange(40) % 10).sum() >= 32


def test_rows_are_labelled_only_if_each_has_one_prompt():
    assert grid_layout(["a", "a", "b", "b"]) == {"columns": 2, "row_labels": ["a", "b"]}
    for mixed in (["a", "b", "a", "b"], ["a", "b"], ["a", "a", "b"], ["a", "a", "b", "a", "b", "b"]):
        assert grid_layout(mixed) == {}


def test_a_saved_list_is_replaced_by_the_one_that_is_given(capsys):
    @dataclass(frozen=True)
    class Config:
        caption: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
        resume: str | None = None

    seen = []
    for flags in ([], ["--caption", "c"]):
        run_command(seen.append, Config, lambda *_: Config(("a", "b")), ["--resume", "run", *flags])
    assert [config.caption for config in seen] == [("a", "b"), ("c",)]


# -- wrong input: one line, exit code 2, nothing written -----------------------------------------------------


def refused(capsys, call, lesson, *flags):
    """Return the line that a wrong call prints."""
    with pytest.raises(SystemExit) as stop:
        call(lesson, *map(str, flags))
    captured = capsys.readouterr()
    assert stop.value.code == 2
    assert "Traceback" not in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, captured.err
    return lines[0]


def test_wrong_checkpoints(runs, place, capsys):
    (place / "random.safetensors").write_bytes(bytes(range(256)) * 9)
    whole = sorted((runs / "lesson_05_cfg" / "checkpoints").glob("step_*.safetensors"))[-1].read_bytes()
    (place / "short.safetensors").write_bytes(whole[: len(whole) // 2])
    (place / "empty").mkdir()
    save_weights(place / "bare.safetensors", {"x": torch.zeros(2)}, {})
    before = sorted(place.iterdir())
    lesson_4 = runs / "lesson_04_text_conditioning"
    for checkpoint, message in {
        lesson_4: "comes from lesson_04_text_conditioning, not from lesson_05_cfg",
        "random.safetensors": "not a complete .safetensors file",
        "short.safetensors": "not a complete .safetensors file",
        "bare.safetensors": "comes from no lesson of this series",
        "empty": "folder without checkpoints",
        "nowhere": "does not exist",
    }.items():
        assert message in refused(capsys, sample, "lesson_05_cfg", "--checkpoint", checkpoint, "--steps", "1")
    assert sorted(place.iterdir()) == before


def test_wrong_sampling_flags(runs, place, capsys):
    (place / "blank.txt").write_text("\n \n")
    (place / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (place / "file").write_text("")
    before = sorted(place.iterdir())
    good = ["--checkpoint", runs / "lesson_05_cfg", "--prompt", "a 1"]
    for flags, message in {
        ("--prompts-file", "none.txt"): "--prompts-file none.txt cannot be read",
        ("--prompts-file", "blank.txt"): "holds no prompts",
        ("--prompts-file", "binary.txt"): "not a text file",
        ("--guidance-scale", -1): "--guidance-scale is -1.0",
        ("--guidance-scale", "nan"): "--guidance-scale is nan",
        ("--steps", 0): "--steps is 0",
        ("--steps", -5): "--steps is -5",
        ("--steps", 1001): "--steps is 1001; it must lie between 1 and 1000, the number of timesteps",
        ("--num-samples", 0): "--num-samples is 0",
        ("--sampler", "euler"): "--sampler euler is unknown; choose ddpm, ddim, dpm++",
        ("--out", "image.jpg"): "must end in .png, .npz or .gif",
        ("--out", "file/image.png"): "cannot be created or written",
        ("--device", "abacus"): "--device abacus cannot be used",
    }.items():
        assert message in refused(capsys, sample, "lesson_05_cfg", *good, *flags)
    assert sorted(place.iterdir()) == before


def test_what_another_lesson_has_is_refused(place, capsys):
    line = refused(capsys, sample, "lesson_02_improved_ddpm", "--sampler", "dpm++")
    assert line == "error: --sampler dpm++ is unknown; choose ddpm, ddim"
    line = refused(capsys, sample, "lesson_03_adm", "--digit", 12)
    assert line == "error: --digit is 12; it must be a digit, 0 to 9"
    assert list(place.iterdir()) == []


def test_wrong_training_flags(runs, place, capsys, monkeypatch):
    (place / "file").write_text("")
    (place / "broken").mkdir()
    (place / "broken" / "checkpoints").mkdir()
    (place / "broken" / "config.json").write_text((runs / "lesson_01_ddpm" / "config.json").read_text())
    (place / "broken" / "checkpoints" / "step_0000001.pt").write_bytes(b"PK not a zip")
    monkeypatch.setattr("common.digits.mnist.NUM_SYNTHETIC", 3000)
    before = sorted(place.rglob("*"))
    for flags, message in {
        ("--steps", 0): "--steps is 0",
        ("--batch-size", -2): "--batch-size is -2",
        ("--time-limit", 0): "--time-limit is 0",
        ("--time-limit", "inf"): "--time-limit is inf; it must be finite",
        ("--num-eval", 1): "--num-eval is 1",
        ("--sample-steps", 1001): "--sample-steps is 1001; it must lie between 1 and 1000",
        ("--learning-rate", 0): "--learning-rate is 0",
        ("--learning-rate", "nan"): "--learning-rate is nan",
        ("--ema-decay", 1.5): "--ema-decay is 1.5; it must lie between 0 and 1",
        ("--seed", -1): "--seed is -1; it must lie between 0 and 2147483647",
        ("--dataset", "cifar"): "--dataset cifar is unknown; choose auto, mnist, synthetic",
        ("--dataset", "mnist", "--data-dir", "."): "holds no MNIST",
        ("--resume", "nowhere"): "--resume nowhere does not exist",
        ("--resume", runs / "lesson_02_improved_ddpm"): "is a run of lesson_02_improved_ddpm",
        ("--resume", "broken"): "not a complete training state",
        ("--dataset", "synthetic", "--out", "file/run"): "cannot be created or written",
        ("--dataset", "synthetic", "--out", runs / "lesson_01_ddpm"): "already holds a run",
        ("--device", "abacus"): "--device abacus cannot be used",
    }.items():
        assert message in refused(capsys, train, "lesson_01_ddpm", *flags)
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize("flags", [["--steps", "many"], ["--no-such-flag"]])
def test_flags_that_do_not_parse(flags, place, capsys):
    with pytest.raises(SystemExit) as stop:
        sample("lesson_05_cfg", *flags)
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "lesson, name, advice",
    [
        ("lesson_01_ddpm", "train_mnist", "try a smaller --batch-size"),
        ("lesson_06_miniglide", "train", "try a smaller --batch-size or --activation-checkpointing"),
        ("lesson_01_ddpm", "sample", "try --device cpu"),
    ],
)
def test_a_gpu_that_is_too_small_is_one_line(lesson, name, advice, capsys):
    def fill(config):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 8 GiB.\nMore")

    with pytest.raises(SystemExit) as caught:
        run_command(fill, script(lesson, name).Config, argv=[])
    line = f"error: CUDA out of memory. Tried to allocate 2.00 GiB; {advice}\n"
    assert caught.value.code == 2 and capsys.readouterr().err == line


@pytest.mark.parametrize("lesson", [LESSONS[0], LESSONS[-1]])
@pytest.mark.parametrize(
    "name, message",
    [("train_mnist", "be greater than zero"), ("sample", "lie between 1 and 1000, the number of timesteps")],
)
def test_help_and_wrong_input_from_the_shell(lesson, name, message, place):
    path = str(Path(ROOT) / lesson / f"{name}.py")
    shown = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
    assert shown.returncode == 0 and "--steps" in shown.stdout and "--seed" in shown.stdout
    wrong = subprocess.run([sys.executable, path, "--steps", "0"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr == f"error: --steps is 0; it must {message}\n"
    assert list(place.iterdir()) == []
