"""Lesson 6's measurement of photos of kinds of things: evaluate.py --kinds and its classifier."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run_command
from common.images import to_tensor
from lesson_05_cfg.pipeline import PipelineOutput
from lesson_06_miniglide import evaluate
from lesson_06_miniglide.image_data.captioned_images import captioned_images, load_images
from lesson_06_miniglide.scoring import features, photo_metrics
from lesson_06_miniglide.scoring.features import fid_kid
from lesson_06_miniglide.scoring.kind_classifier import WEIGHTS as KIND_WEIGHTS
from lesson_06_miniglide.scoring.kind_classifier import (
    kind_of,
    kinds_in,
    labels_of,
    load_kind_classifier,
    load_photos,
    read_weights,
)
from lesson_06_miniglide.scoring.photo_metrics import kind_metrics

KINDS = ["a lemon", "an orange"]


class RedOrGreen:
    """A classifier that takes red images for the first kind and green ones for the second."""

    classes = KINDS

    def predict(self, images):
        colour = torch.from_numpy(images.reshape(len(images), -1, 3).mean(1)).float() / 255
        return colour + 0.01 * torch.randn(len(images), 3), colour[:, :2].softmax(1)


def plain(colours):
    """Images [N, 64, 64, 3] of one colour each."""
    return np.stack([np.full((64, 64, 3), colour, dtype=np.uint8) for colour in colours])


RED, GREEN = (250, 10, 10), (10, 250, 10)


def test_kinds_are_the_captions_that_end_with_no_shorter_one():
    captions = ["a photo of a lemon", "a lemon", "this is an orange", "an orange", "a close-up of a lemon"]
    assert kinds_in(captions) == KINDS
    assert [kind_of(caption, KINDS) for caption in captions] == [0, 0, 1, 1, 0]
    with pytest.raises(ValueError, match="'a photo of a cat' names none of the kinds a lemon, an orange"):
        kind_of("a photo of a cat", KINDS)


def test_labels_follow_the_split():
    photos = captioned_images("x", plain([RED, GREEN] * 10), ["a lemon", "a photo of an orange"] * 10)
    train, held_out = photos.split(0.1)
    for part in (train, held_out):
        assert labels_of(part, KINDS).tolist() == (part.indices % 2).tolist()


def test_accuracy_and_diversity_of_samples_are_those_of_the_classifier(monkeypatch):
    monkeypatch.setattr(photo_metrics, "load_kind_classifier", RedOrGreen)
    torch.manual_seed(0)
    photos, captions = plain([RED, GREEN] * 50), ["a lemon", "an orange"] * 50
    samples = plain([RED, GREEN, RED, RED] * 25)  # the last of four should be green
    metrics = kind_metrics(samples, captions, photos, captions)
    assert metrics["kind_accuracy"] == 0.75 and metrics["kind_accuracy_real"] == 1
    assert metrics["diversity"] > 100  # oranges of two colours, where those of photos have one


class Copier:
    """A pipeline that draws one photo of each kind again and again."""

    name = "copier"

    def __call__(self, prompts, guidance_scale, steps, sampler, seed):
        return PipelineOutput(to_tensor(plain([(RED, GREEN)[kind_of(p, KINDS)] for p in prompts])), prompts)


def test_kinds_are_measured_on_the_captions_of_held_out_photos(tmp_path, monkeypatch):
    from tests.test_lesson_06_data import save

    rng = np.random.default_rng(0)
    for i in range(60):
        pixels = plain([(RED, GREEN)[i % 2]])[0] ^ rng.integers(0, 8, (64, 64, 3), dtype=np.uint8)
        save(Image.fromarray(pixels), tmp_path / f"{i:02}.png")
        (tmp_path / f"{i:02}.txt").write_text(KINDS[i % 2])
    for module in (features, photo_metrics):
        monkeypatch.setattr(module, "load_kind_classifier", RedOrGreen)
    config = evaluate.Config(data_dir=str(tmp_path), kinds=True, out=str(tmp_path / "out"), sampler="ddim")
    data = load_images(replace(config, cache_dir=str(tmp_path / "cache")))
    metrics = evaluate.evaluate_kinds(Copier(), data, features.load_kind_features(), config)
    assert metrics["n"] == 6 and metrics["kind_accuracy"] == metrics["kind_accuracy_real"] == 1
    assert metrics["fid"] >= 0 and {"kid", "kid_error", "fid_floor", "memorised"} <= metrics.keys()
    assert fid_kid(data.images[:4], data.images[:4], features.load_kind_features())["fid"] < 0.01


def test_kinds_need_photos(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        run_command(evaluate.main, evaluate.Config, argv=["--kinds", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "--kinds needs --data-dir" in capsys.readouterr().err


@pytest.mark.skipif(not KIND_WEIGHTS.exists(), reason="not trained")
def test_the_kind_classifier_is_as_accurate_as_its_metadata_says(real_data, tmp_path):
    classifier = load_kind_classifier()
    _, held_out = load_photos(str(real_data / "sbu_mini"), str(tmp_path))
    predicted = classifier.predict(held_out.images[held_out.indices.numpy()])[1].argmax(-1)
    accuracy = (predicted == labels_of(held_out, classifier.classes)).float().mean().item()
    metadata = read_weights(KIND_WEIGHTS, "")[1]
    assert len(held_out) == metadata["test_photos"] == 1000
    assert accuracy == pytest.approx(metadata["test_accuracy"], abs=0.01)
