"""Lesson 6's evaluate.py, report_tables.py and metrics: resumable, and right where the answer is known."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import device
from common.cli import run_command
from common.errors import UserError
from common.images import to_pixels, to_tensor
from common.metrics import fid_between, kid_between
from common.training.checkpoints import pretrained_path
from lesson_05_cfg.pipeline import PipelineOutput
from lesson_06_miniglide import evaluate, train
from lesson_06_miniglide.evaluate import Config, evaluate_photos, evaluate_shapes, sample_cached
from lesson_06_miniglide.image_data.captioned_images import load_images, make_shapes
from lesson_06_miniglide.model import unwrap
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.pipeline import MiniGlidePipeline
from lesson_06_miniglide.scoring import features, photo_metrics
from lesson_06_miniglide.scoring.dog_classifier import WEIGHTS, load_dog_classifier, load_dogs
from lesson_06_miniglide.scoring.features import fid_kid, load_classifier_features, pixels_8x8
from lesson_06_miniglide.scoring.photo_metrics import blurred, breed_metrics, memorization_rate
from lesson_06_miniglide.shapes.checker import caption_accuracy
from lesson_06_miniglide.shapes.render import render_captions
from lesson_06_miniglide.shapes.scenes import parse
from tests.conftest import ROOT


class Renderer:
    """A pipeline that renders the captions, and counts its samples."""

    name = "renderer"

    def __init__(self):
        self.num_samples = 0

    def __call__(self, prompts, guidance_scale, steps, sampler, seed):
        self.num_samples += len(prompts)
        return PipelineOutput(to_tensor(render_captions(prompts, seed)), prompts)


@pytest.fixture
def captions(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK_SIZE", 4)
    data = make_shapes(10)
    return data.captions_for(torch.arange(10))


def test_an_interrupted_evaluation_continues_and_the_last_short_chunk_counts(tmp_path, captions):
    config, renderer = Config(out=str(tmp_path)), Renderer()
    whole = sample_cached(renderer, captions, "x", config)
    assert whole.shape == (10, 64, 64, 3) and renderer.num_samples == 10
    next(tmp_path.glob("*/000004.npz")).unlink()
    assert (sample_cached(renderer, captions, "x", config) == whole).all() and renderer.num_samples == 14
    with pytest.raises(UserError, match="samples of other captions"):
        sample_cached(renderer, captions[::-1], "x", config)


def test_rendered_captions_have_full_accuracy(tmp_path):
    metrics = evaluate_shapes(Renderer(), Config(out=str(tmp_path), num_samples=6))
    accuracies = metrics["caption_accuracy"], metrics["caption_accuracy_held_out"]
    assert (metrics["n"], *accuracies) == (6, 1.0, 1.0)
    by_kind = {k: v for k, v in metrics.items() if k.split("_")[0] in ("single", "count", "pair", "relation")}
    assert len(by_kind) == 8 and set(by_kind.values()) <= {1.0, None}
    assert by_kind["pair_accuracy"] == by_kind["relation_accuracy_held_out"] == 1
    real = make_shapes(6, seed=1).images
    halves = fid_kid(real, real, pixels_8x8)["fid_floor"]
    assert metrics["fid"] < halves and abs(metrics["kid"]) < 0.05


def test_the_floor_of_shapes_compares_renders_of_the_same_captions(tmp_path):
    metrics = evaluate_shapes(Renderer(), Config(out=str(tmp_path), num_samples=40))
    assert metrics["fid"] == pytest.approx(metrics["fid_floor"], rel=0.5)  # the samples are such renders


class Unconditional(Renderer):
    name = "unconditional"

    def __call__(self, prompts, *settings):
        return super().__call__(["a small red circle"] * len(prompts), *settings)


def test_samples_that_ignore_their_captions_are_far_from_the_renders(tmp_path):
    metrics = evaluate_shapes(Unconditional(), Config(out=str(tmp_path), num_samples=20))
    assert metrics["caption_accuracy"] < 0.2 and metrics["kid"] > 0.08


def test_distances_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator)
    b = torch.randn(20_000, 3, generator=generator) * 2 + 1
    # |mean difference|^2 + sum (sd - sd')^2 = 3 + 3
    assert fid_between(a, b) == pytest.approx(6, rel=0.05)
    assert abs(kid_between(a[:10_000], a[10_000:])) < 0.02 < kid_between(a, b)


def test_the_floor_compares_one_half_with_the_other():
    images = make_shapes(40).images

    def extract(images):
        return torch.from_numpy(images.reshape(len(images), -1)[:, ::2011].astype(np.float32))

    same = fid_kid(images, images, extract)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    halves = [extract(images[half.numpy()]) for half in order.chunk(2)]
    assert same["fid_floor"] == pytest.approx(fid_between(*halves)) and same["fid_floor"] > 0
    assert same["fid"] == pytest.approx(0, abs=1e-3 * same["fid_floor"])


class Copier:
    """A pipeline that copies one photo per breed, and for every other caption that of the wrong breed."""

    name = "copier"

    def __init__(self, photos):
        self.photos = photos

    def __call__(self, prompts, guidance_scale, steps, sampler, seed):
        known = sorted(self.photos)
        chosen = [c if i % 2 else known[known.index(c) - 1] for i, c in enumerate(prompts)]
        return PipelineOutput(to_tensor(np.stack([self.photos[name] for name in chosen])), prompts)


def test_photos_of_dogs_are_measured(tmp_path, monkeypatch):
    from tests.test_lesson_06_data import picture, save

    for i, breed in enumerate(("ant", "bee")):
        for k in range(12):
            for part in ("train", "validation"):
                photo = picture(1000 * i + k + 500 * (part == "train"))
                save(photo, tmp_path / part / "Images" / f"n0000000{i}-{breed}" / f"{k}.png")

    class Classifier:
        """Recognizes the two photos."""

        breeds = ("ant", "bee")

        def predict(self, images):
            found = torch.tensor([[np.array_equal(x, photo) for photo in photos.values()] for x in images])
            p = torch.cat([found.float(), 0.5 * torch.ones(len(images), 1)], 1)
            return torch.from_numpy(images[:, ::16, ::16].reshape(len(images), -1).astype(np.float32)), p

    config = Config(data_dir=str(tmp_path / "train"), dogs=True, num_samples=8, out=str(tmp_path / "out"))
    config = replace(config, validation_dir=str(tmp_path / "validation"))
    data = load_images(config)
    photos = {"ant": data.images[0].copy(), "bee": data.images[12].copy()}
    for module in (features, photo_metrics):
        monkeypatch.setattr(module, "load_dog_classifier", Classifier)
    metrics = evaluate_photos(Copier(photos), data, load_classifier_features(), config)
    assert metrics["n"] == 8 and metrics["read_as_dog"] == 1 and metrics["breed_accuracy"] == 0.5
    assert metrics["memorised"] == 1 and metrics["fid"] > 0 and 0 <= metrics["memorised_blurred"] <= 1


def test_the_dog_classifier_is_as_accurate_as_its_metadata_says(real_data, tmp_path):
    classifier = load_dog_classifier()
    folder = str(real_data / "stanford_dogs_mini_val")
    images, labels, _ = load_dogs(folder, str(tmp_path), classifier.breeds)
    with safe_open(WEIGHTS, "pt") as file:
        expected = {name: json.loads(value) for name, value in file.metadata().items()}
    captions = [classifier.breeds[label] for label in labels.tolist()]
    metrics = breed_metrics(images, captions)
    assert len(images) == expected["test_dogs"]
    assert metrics["breed_accuracy"] == pytest.approx(expected["test_breed_accuracy"], abs=0.01)
    assert metrics["read_as_dog"] == pytest.approx(expected["test_dogs_read_as_dogs"], abs=0.01)


def test_breed_accuracy_without_known_breeds_is_none():
    metrics = breed_metrics(make_shapes(4).images, ["a cat"] * 4)
    assert metrics["breed_accuracy"] is None and 0 <= metrics["read_as_dog"] <= 1


@pytest.mark.parametrize("flags", [["--dogs"], ["--validation-dir", "x"], ["--image-limit", "3"]])
def test_flags_about_photos_need_a_data_dir(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_command(evaluate.main, Config, argv=[*flags, "--out", str(tmp_path / "out")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and f"{flags[0]} needs --data-dir" in error and "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_copies_are_memorized_and_new_images_are_not():
    train_images, val_images, new_images = (make_shapes(n, seed=n).images for n in (60, 100, 50))
    assert memorization_rate(train_images[:20], train_images, val_images) == 1
    mirrored = train_images[:20, :, ::-1]  # as in training
    assert memorization_rate(mirrored, train_images, val_images) == 1
    assert memorization_rate(new_images, train_images, val_images) < 0.2


def test_blurred_images_have_no_detail_beyond_16_pixels_and_the_same_colours():
    images = make_shapes(5).images
    soft = blurred(images)
    assert soft.shape == images.shape and soft.dtype == np.uint8
    assert abs(soft.mean((1, 2)) - images.mean((1, 2))).max() < 2
    step = abs(np.diff(soft.astype(int), axis=2)).max()
    assert step <= 256 / 4 < abs(np.diff(images.astype(int), axis=2)).max()


def nine_of_coco(tmp_path):
    from tests.test_lesson_06_data import coco

    coco(tmp_path / "coco", range(9), range(9), [(i, f"photo {i}") for i in range(9)])
    return str(tmp_path / "coco")


def test_missing_inception_is_reported_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)  # as if it were not installed
    flags = ["--data-dir", nine_of_coco(tmp_path), "--features", "inception", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        run_command(evaluate.main, Config, argv=flags)
    error = capsys.readouterr().err
    assert "--features inception is not available" in error and error.count("\n") == 1


def test_table_3_of_the_report_two_checkpoints_on_the_captions_of_coco(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK_SIZE", 4)
    data, networks = nine_of_coco(tmp_path), {}
    for name, flags in (("hybrid", []), ("simple", ["--no-vlb"])):
        small = ["--num-channels", "24", "--num-head-channels", "8", "--image-limit", "20", "--device", "cpu"]
        run = str(tmp_path / name)
        run_command(train.main, train.Config, argv=["--steps", "1", "--out", run, *small, *flags])
        networks[name] = run
    flags = [x for name in ("simple", "hybrid") for x in ("--checkpoint", networks[name])]
    flags += ["--data-dir", data, "--num-samples", "7", "--steps", "2", "--sampler", "ddpm"]
    flags += ["--features", "judge"]  # the former name of "classifier"
    run_command(evaluate.main, Config, argv=[*flags, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert [row["checkpoint"] for row in rows] == [networks["simple"], networks["hybrid"]]
    for row in rows:
        settings = (row["n"], row["guidance_scale"], row["sampler"], row["sample_steps"], row["features"])
        assert settings == (7, 3, "ddpm", 2, "classifier") and row["resize_filter"]
        assert row["fid"] > 0 < row["fid_floor"]


def test_pretrained_weights_draw_shapes_of_one_kind():
    data = make_shapes(80, seed=3)
    captions = [c for c in data.captions_for(torch.arange(80)) if parse(c).relation is None][:24]
    samples = to_pixels(MiniGlidePipeline.from_pretrained(device="cpu")(captions, 3).tensor)
    by_chance = caption_accuracy(samples, captions[1:] + captions[:1])
    assert caption_accuracy(samples, captions) >= 0.3 and by_chance <= 0.1


class Rounded(TorchDispatchMode):
    """Count how often each tensor is rounded to bf16."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "_to_copy" in str(operation) and kwargs.get("dtype") == torch.bfloat16:
            self.counts[args[0].data_ptr()] += 1
        return operation(*args, **(kwargs or {}))


def test_weights_are_rounded_once_per_sample_and_not_once_per_step(monkeypatch):
    monkeypatch.setattr(device, "has_fast_bf16", lambda device: True)  # slow is fine here
    pipe = MiniGlidePipeline.from_pretrained(str(pretrained_path(LESSON, "dogs")), "cpu")
    with Rounded() as rounded:
        pipe(["a red circle"], 3, steps=3)
    layers = [m for m in unwrap(pipe.network).unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {rounded.counts[layer.weight.data_ptr()] for layer in layers} == {1}


def test_tables_from_a_checkpoint(tmp_path):
    def run(script, *flags):
        command = [sys.executable, str(ROOT / "lesson_06_miniglide" / script), *map(str, flags)]
        result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    small = ["--num-channels", 24, "--num-head-channels", 8, "--image-limit", 20, "--device", "cpu"]
    run("train.py", "--steps", 1, "--out", "run", *small)
    run("report_tables.py", "--checkpoint", "run", "--table", 1, "--steps", 2, "--scales", 1, 3)
    run("report_tables.py", "--checkpoint", "run", "--table", 2, "--steps", 2, "--num-samples", 2)
    one, two = (Image.open(tmp_path / "tables" / f"table_{i}.png") for i in (1, 2))
    assert one.size[1] > one.size[0] > 100 and two.size[0] > 100  # six captions by two scales
    run("evaluate.py", "--checkpoint", "run", "--checkpoint", "run", "--num-samples", 4, "--steps", 2)
    content = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert [row["sample_steps"] for row in content["rows"]] == [2, 2] and content["machine"]["torch"]
