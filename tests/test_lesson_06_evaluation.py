"""Lesson 6's evaluate.py, tables.py and judge: resumed without drawing twice, and right on what is known."""

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import command
from common.command import UserError, run_command
from common.data import to_pixels
from common.evaluation import fid_between, kid_between
from lesson_06_miniglide import evaluate, shapes, train
from lesson_06_miniglide.captioned_images import drawn_shapes
from lesson_06_miniglide.evaluate import Config, check_shapes, compare, draw_all, memorised
from lesson_06_miniglide.generate import Generator
from tests.conftest import ROOT


class Painter:
    """A generator that draws what the captions say, and counts."""

    name = "painter"

    def __init__(self):
        self.drawn = 0

    def draw(self, captions, guidance_scale, config, steps, sampler):
        import random

        rng = random.Random(config.seed)
        self.drawn += len(captions)
        images = np.stack([shapes.draw(shapes.parse(caption), rng) for caption in captions])
        return torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.fixture
def captions(monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    data = drawn_shapes(10)
    return data.captions_of(torch.arange(10))


def test_an_interrupted_evaluation_goes_on_and_the_last_short_batch_counts(tmp_path, captions):
    config, painter = Config(out=str(tmp_path)), Painter()
    whole = draw_all(painter, captions, "x", config)
    assert whole.shape == (10, 64, 64, 3) and painter.drawn == 10
    next(tmp_path.glob("*/000004.npz")).unlink()
    assert (draw_all(painter, captions, "x", config) == whole).all() and painter.drawn == 14
    with pytest.raises(UserError, match="samples of other captions"):
        draw_all(painter, captions[::-1], "x", config)


def test_who_draws_right_has_a_full_score(tmp_path):
    measured = check_shapes(Painter(), Config(out=str(tmp_path), num_samples=6))
    assert (measured["n"], measured["all_right"], measured["all_right_held_out"]) == (6, 1.0, 1.0)
    real = drawn_shapes(6, seed=1).images
    halves = compare(real, real, evaluate.thumbnails)["fid_floor"]
    assert measured["fid"] < halves and abs(measured["kid"]) < 0.05


def test_the_floor_of_shapes_is_of_as_many_drawings_of_the_same_captions(tmp_path):
    measured = check_shapes(Painter(), Config(out=str(tmp_path), num_samples=40))
    assert measured["fid"] == pytest.approx(measured["fid_floor"], rel=0.5)  # the painter's are such drawings


class Forgetful(Painter):
    name = "forgetful"

    def draw(self, captions, *settings):
        return super().draw(["a small red circle"] * len(captions), *settings)


def test_who_draws_always_the_same_is_far_from_the_drawings(tmp_path):
    measured = check_shapes(Forgetful(), Config(out=str(tmp_path), num_samples=20))
    assert measured["all_right"] < 0.2 and measured["kid"] > 0.08


def test_distances_of_known_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(20_000, 3, generator=generator)
    b = torch.randn(20_000, 3, generator=generator) * 2 + 1
    # |mean difference|^2 + sum (sd - sd')^2 = 3 + 3
    assert fid_between(a, b) == pytest.approx(6, rel=0.05)
    assert abs(kid_between(a[:10_000], a[10_000:])) < 0.02 < kid_between(a, b)


def test_the_floor_is_one_half_against_the_other():
    images = drawn_shapes(40).images

    def features_of(images):
        return torch.from_numpy(images.reshape(len(images), -1)[:, ::2011].astype(np.float32))

    same = compare(images, images, features_of)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
    halves = [features_of(images[half.numpy()]) for half in order.chunk(2)]
    assert same["fid_floor"] == pytest.approx(fid_between(*halves)) and same["fid_floor"] > 0
    assert same["fid"] == pytest.approx(0, abs=1e-3 * same["fid_floor"])


class Copier:
    """A generator that knows a photo of each breed, and gives every other one of it."""

    name = "copier"

    def __init__(self, photos):
        self.photos = photos

    def draw(self, captions, guidance_scale, config, steps, sampler):
        known = sorted(self.photos)
        wanted = [c if i % 2 else known[known.index(c) - 1] for i, c in enumerate(captions)]
        return torch.stack([self.photos[name] for name in wanted]).permute(0, 3, 1, 2) / 127.5 - 1


def test_photos_of_dogs_are_measured(tmp_path, monkeypatch):
    from tests.test_lesson_06_data import picture, save

    for i, breed in enumerate(("ant", "bee")):
        for k in range(12):
            for part in ("train", "held_back"):
                photo = picture(1000 * i + k + 500 * (part == "train"))
                save(photo, tmp_path / part / "Images" / f"n0000000{i}-{breed}" / f"{k}.png")

    class Judge:
        """Knows the two photos."""

        def read(self, images):
            known = [photo.numpy() for photo in photos.values()]
            mine = torch.tensor([[np.array_equal(x, photo) for photo in known] for x in images])
            p = torch.cat([mine.float(), 0.5 * torch.ones(len(images), 1)], 1)
            return torch.from_numpy(images[:, ::16, ::16].reshape(len(images), -1).astype(np.float32)), p

    config = Config(data_dir=str(tmp_path / "train"), dogs=True, num_samples=8, out=str(tmp_path / "out"))
    config = replace(config, held_back_dir=str(tmp_path / "held_back"))
    data = evaluate.load_images(config)
    photos = {breed: torch.from_numpy(data.images[i].copy()) for breed, i in (("ant", 0), ("bee", 12))}
    monkeypatch.setattr(evaluate, "photo_judge", lambda: (Judge(), ["ant", "bee"]))
    measured = evaluate.check_photos(Copier(photos), data, evaluate.judge(), config)
    assert measured["n"] == 8 and measured["read_as_dog"] == 1 and measured["breed_accuracy"] == 0.5
    assert measured["memorised"] == 1 and measured["fid"] > 0 and 0 <= measured["memorised_blurred"] <= 1


@pytest.mark.parametrize("flags", [["--dogs"], ["--held-back-dir", "x"], ["--image-limit", "3"]])
def test_what_is_for_photos_needs_them(flags, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_command(evaluate.main, Config, argv=[*flags, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err
    assert stop.value.code == 2 and f"{flags[0]} needs --data-dir" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


def test_copies_are_memorised_and_new_images_are_not():
    seen, held_back, fresh = (drawn_shapes(n, seed=n).images for n in (60, 100, 50))
    assert memorised(seen[:20], seen, held_back) == 1
    assert memorised(seen[:20, :, ::-1], seen, held_back) == 1  # mirrored, as in training
    assert memorised(fresh, seen, held_back) < 0.2


def test_blurred_means_no_detail_beyond_16_pixels_and_the_same_colours():
    images = drawn_shapes(5).images
    soft = evaluate.blurred(images)
    assert soft.shape == images.shape and soft.dtype == np.uint8
    assert abs(soft.mean((1, 2)) - images.mean((1, 2))).max() < 2
    step = abs(np.diff(soft.astype(int), axis=2)).max()
    assert step <= 256 / 4 < abs(np.diff(images.astype(int), axis=2)).max()


def nine_of_coco(tmp_path):
    from tests.test_lesson_06_data import coco

    coco(tmp_path / "coco", range(9), range(9), [(i, f"picture {i}") for i in range(9)])
    return str(tmp_path / "coco")


def test_inception_that_cannot_be_had_is_said_in_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)  # as where it is not installed
    flags = ["--data-dir", nine_of_coco(tmp_path), "--features", "inception", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        run_command(evaluate.main, Config, argv=flags)
    error = capsys.readouterr().err
    assert "--features inception cannot be had" in error and error.count("\n") == 1


def test_table_3_of_the_report_two_checkpoints_on_the_captions_of_coco(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "CHUNK", 4)
    data, networks = nine_of_coco(tmp_path), {}
    for name, flags in (("hybrid", []), ("simple", ["--no-vlb"])):
        small = ["--num-channels", "24", "--num-head-channels", "8", "--image-limit", "20", "--device", "cpu"]
        run = str(tmp_path / name)
        run_command(train.main, train.Config, argv=["--steps", "1", "--out", run, *small, *flags])
        networks[name] = run
    flags = [x for name in ("simple", "hybrid") for x in ("--checkpoint", networks[name])]
    flags += ["--data-dir", data, "--num-samples", "7", "--steps", "2", "--sampler", "ddpm"]
    run_command(evaluate.main, Config, argv=[*flags, "--out", str(tmp_path / "out")])
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())["rows"]
    assert [row["checkpoint"] for row in rows] == [networks["simple"], networks["hybrid"]]
    for row in rows:
        stated = (row["n"], row["guidance_scale"], row["sampler"], row["sample_steps"])
        assert stated == (7, 3, "ddpm", 2) and row["resize_filter"]
        assert row["fid"] > 0 < row["fid_floor"]


def test_shipped_weights_draw_shapes_of_one_kind():
    drawn = drawn_shapes(80, seed=3)
    captions = [c for c in drawn.captions_of(torch.arange(80)) if shapes.parse(c).relation is None][:24]
    config = Config(device="cpu")
    samples = Generator.load(None, "cpu").draw(captions, 3, config)
    right = shapes.share_right(to_pixels(samples), captions)
    by_chance = shapes.share_right(to_pixels(samples), captions[1:] + captions[:1])
    assert right >= 0.3 and by_chance <= 0.1


class Rounded(TorchDispatchMode):
    """Counts how often each tensor is rounded to bf16."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if "_to_copy" in str(operation) and kwargs.get("dtype") == torch.bfloat16:
            self.times[args[0].data_ptr()] += 1
        return operation(*args, **(kwargs or {}))


def test_weights_are_rounded_once_a_sample_and_not_once_a_step(monkeypatch):
    monkeypatch.setattr(command, "is_fast_at_bf16", lambda device: True)  # slow is good enough here
    generator = Generator.load(None, "cpu")
    with Rounded() as rounded:
        generator.draw(["a red circle"], 3, Config(device="cpu"), steps=3)
    layers = [m for m in generator.network.unet.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert {rounded.times[layer.weight.data_ptr()] for layer in layers} == {1}


def test_tables_from_a_checkpoint(tmp_path):
    def run(script, *flags):
        command = [sys.executable, str(ROOT / "lesson_06_miniglide" / script), *map(str, flags)]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    small = ["--num-channels", 24, "--num-head-channels", 8, "--image-limit", 20, "--device", "cpu"]
    run("train.py", "--steps", 1, "--out", "run", *small)
    run("tables.py", "--checkpoint", "run", "--table", 1, "--steps", 2, "--scales", 1, 3)
    run("tables.py", "--checkpoint", "run", "--table", 2, "--steps", 2, "--num-samples", 2)
    one, two = (Image.open(tmp_path / "tables" / f"table_{i}.png") for i in (1, 2))
    assert one.size[1] > one.size[0] > 100 and two.size[0] > 100  # six captions by two scales
    run("evaluate.py", "--checkpoint", "run", "--checkpoint", "run", "--num-samples", 4, "--steps", 2)
    content = json.loads((tmp_path / "evaluation" / "evaluation.json").read_text())
    assert [row["sample_steps"] for row in content["rows"]] == [2, 2] and content["machine"]["torch"]
