"""Do the metrics measure what they say? FID rises with every kind of damage; other data is refused."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from common.digits import evaluation
from common.digits.captions import COLOURS, balanced_prompts, colourize
from common.digits.classifier import DigitClassifier, load_digit_classifier
from common.digits.evaluation import (
    diversity,
    evaluate,
    fid_to_reference,
    mnist_reference,
    read_colours,
    real_features,
    reference_for,
    reference_from_digits,
)
from common.digits.mnist import Digits, load_digits, preprocess
from common.digits.synthetic import render_digits
from common.errors import UserError
from common.files import read_json
from common.metrics import identity_extractor, kid_between
from common.training.run_dir import RunDir
from lesson_05_cfg import train_mnist as lesson_5


def synthetic(n, seed):
    return preprocess(render_digits(torch.arange(n) % 10, torch.Generator().manual_seed(seed)))


@pytest.fixture(scope="module")
def digits():
    return Digits("synthetic", synthetic(4000, 0), torch.arange(4000) % 10)


@pytest.fixture(scope="module")
def reference(digits):
    return reference_from_digits(digits, num_validation=1000)


@pytest.fixture(scope="module")
def fresh():
    """Other synthetic digits, of the same kind as the reference."""
    return synthetic(1000, 1)


def predict(images):
    return load_digit_classifier().predict(images)[0]


def test_fid_rises_with_every_kind_of_damage(fresh, reference):
    clean = fid_to_reference(predict(fresh), reference)
    assert clean < 3 * fid_to_reference(real_features(reference, 1000), reference)
    kernel = torch.ones(1, 1, 3, 3) / 9
    noise = torch.randn(fresh.shape, generator=torch.Generator().manual_seed(2))
    damaged = {
        "blur": [F.conv2d(fresh + 1, kernel, padding=1) - 1],
        "noise": [fresh + 0.2 * noise, fresh + 0.5 * noise],
        "a missing digit": [fresh[torch.arange(1000) % 10 != 4]],
        "duplicates": [fresh[:30].repeat(34, 1, 1, 1)[:1000]],
    }
    damaged["blur"].append(F.conv2d(damaged["blur"][0] + 1, kernel, padding=1) - 1)
    for name, stages in damaged.items():
        values = [clean, *(fid_to_reference(predict(images), reference) for images in stages)]
        assert values == sorted(values) and values[1] > 1.5 * clean, f"{name}: {values}"


def test_fid_to_a_reference_is_that_of_torchmetrics(reference):
    """Whose sums are filled in from the reference's mean and covariance; n cancels out."""
    features, n = reference.features[:500].double() * 1.3 + 0.4, 3000
    metric = FrechetInceptionDistance(feature=identity_extractor(64))
    metric.real_features_num_samples += n
    metric.real_features_sum += reference.mean * n
    outer = n * torch.outer(reference.mean, reference.mean)
    metric.real_features_cov_sum += reference.covariance * (n - 1) + outer
    metric.update(features, real=False)
    assert fid_to_reference(features, reference) == pytest.approx(metric.compute().item(), rel=1e-5)


def test_kid_is_near_zero_for_the_same_images_and_rises(fresh, reference):
    features = predict(fresh)
    same = kid_between(reference.features, features)
    other = kid_between(reference.features, features + 0.5)
    assert abs(same) < 0.1 * other


def test_stored_features_of_mnist_agree_with_mnist(real_data):
    stored, test = mnist_reference(), load_digits("mnist", str(real_data), train=False)
    torch.testing.assert_close(predict(test.images), stored.features, rtol=2e-2, atol=2e-2)
    assert torch.equal(test.labels, stored.labels)
    assert fid_to_reference(stored.features, stored) < 1


def test_the_floor_falls_with_n():
    reference = mnist_reference()
    floors = [fid_to_reference(real_features(reference, n), reference) for n in (5000, 300)]
    assert floors[0] < floors[1]


def test_a_part_of_the_real_images_has_all_digits(reference):
    """The labels of synthetic digits alternate, so that every second one is even."""
    half, whole = (fid_to_reference(real_features(reference, n), reference) for n in (500, 1000))
    assert half < 3 * whole


def test_diversity_of_real_is_one_and_of_copies_zero(digits, reference):
    features = predict(digits.images[:1000])
    assert diversity(features, digits.labels[:1000], reference) == pytest.approx(1, abs=0.15)
    assert diversity(features[:10].repeat(5, 1), torch.arange(10).repeat(5), reference) == pytest.approx(
        0, abs=1e-6
    )


def test_prompt_and_colour_accuracy(digits, reference):
    _, wanted, colours = balanced_prompts(700)
    indices = torch.arange(700) // 10 * 10 + wanted  # the labels run 0, 1 .. 9, 0 ..
    images = digits.images[indices]
    right = evaluate(colourize(images, colours), reference, wanted, colours)
    assert right["colour_accuracy"] == 1 and right["digit_accuracy"] > 0.85 and right["n"] == 700
    assert right["held_out_both_accuracy"] > 0.7 and right["fid"] > 0 and right["fid_floor"] > 0
    wrong = evaluate(colourize(images, (colours + 1) % len(COLOURS)), reference, (wanted + 1) % 10, colours)
    assert wrong["colour_accuracy"] == 0 and wrong["digit_accuracy"] < 0.1


def on_background(colour, background=(0, 0, 0)):
    """A bar of one colour, in the size of a digit."""
    image = torch.tensor(background).view(1, 3, 1, 1).expand(1, 3, 32, 32).float().clone()
    image[:, :, 8:24, 13:19] = torch.tensor(colour).float().view(1, 3, 1, 1)
    return image / 127.5 - 1


@pytest.mark.parametrize(
    ("colour", "background", "name"),
    [
        ((0, 255, 255), (0, 0, 0), None),  # cyan is neither blue nor green
        ((128, 255, 0), (0, 0, 0), None),
        ((0, 0, 0), (255, 90, 90), None),  # a black digit on red
        ((255, 255, 255), (255, 90, 90), None),
        ((0, 0, 0), (0, 0, 0), None),
        ((100, 35, 35), (0, 0, 0), None),  # too dark
        ((0, 0, 255), (0, 0, 0), "blue"),  # stronger tones than the palette's
        ((255, 0, 0), (0, 0, 0), "red"),
        ((0, 255, 0), (0, 0, 0), "green"),
        ((160, 160, 160), (0, 0, 0), "white"),
    ],
)
def test_colours_that_are_none_of_the_palette_are_not_read_as_one(colour, background, name):
    read = read_colours(on_background(colour, background)).item()
    assert read == (-1 if name is None else COLOURS.index(name))


def test_colours_of_the_palette_are_read_in_any_brightness_and_with_noise(digits):
    images, colours = colourize(digits.images[:140], torch.arange(140) % 7), torch.arange(140) % 7
    noise = 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    for shown in (images, 0.8 * (images + 1) - 1, images + noise):
        assert torch.equal(read_colours(shown), colours)


# -- other data and other classifiers ------------------------------------------------------------------------


def test_images_in_0_to_1_are_refused(digits):
    with pytest.raises(ValueError, match=r"x_0 runs from 0\.00 to 1\.00; images must be scaled to \[-1, 1\]"):
        reference_from_digits(replace(digits, images=(digits.images + 1) / 2))


def test_labels_that_the_classifier_has_no_class_for_are_refused(digits):
    letters = Digits("letters", digits.images, torch.arange(4000) % 26)
    with pytest.raises(UserError, match="letters has the label 25, but the classifier has only 10 classes"):
        reference_from_digits(letters)


def test_too_few_images_for_a_covariance_are_refused(digits):
    few = Digits("few", digits.images[:1064], digits.labels[:1064])
    with pytest.raises(UserError, match="few has 1064 images; a covariance of 64 features needs more"):
        reference_from_digits(few, num_validation=1000)
    enough = Digits("enough", digits.images[:1065], digits.labels[:1065])
    covariance = reference_from_digits(enough, num_validation=1000).covariance
    assert torch.linalg.matrix_rank(covariance) == 64


def test_labels_that_the_classifier_does_not_predict_are_refused(digits):
    shuffled = digits.labels[torch.randperm(4000, generator=torch.Generator().manual_seed(0))]
    with pytest.raises(UserError, match=r"predicts 1\d% of the labels of scrambled; it was made for other"):
        reference_from_digits(Digits("scrambled", digits.images, shuffled))


class ReversedClassifier(DigitClassifier):
    """The pretrained classifier with its classes in reverse order; records how many images it saw."""

    def __init__(self):
        super().__init__()
        self.load_state_dict(load_digit_classifier().state_dict())
        last = self.head[2]
        last.weight, last.bias = (nn.Parameter(p.detach().flip(0)) for p in (last.weight, last.bias))
        self.eval().requires_grad_(False)
        self.seen = []

    def predict(self, images, batch_size=1000):
        self.seen.append(len(images))
        return super().predict(images, batch_size)


def test_a_classifier_that_is_passed_in_is_used(digits):
    """Also for data that is called "mnist", whose stored features are another classifier's."""
    reversed_digits, classifier = Digits("mnist", digits.images, 9 - digits.labels), ReversedClassifier()
    with pytest.raises(UserError, match="it was made for other data"):
        reference_from_digits(reversed_digits)
    reference = reference_for(reversed_digits, classifier)
    assert len(reference.features) == 2000 and classifier.seen == [4000]
    images, labels = digits.images[:500], reversed_digits.labels[:500]
    assert evaluate(images, reference, labels, classifier=classifier)["digit_accuracy"] > 0.8
    assert evaluate(images, reference, labels)["digit_accuracy"] < 0.1


def test_lesson_5_measures_with_the_classifier_that_is_passed_in(digits, tmp_path, monkeypatch):
    """In a dry run, on data of its own, without looking at the pretrained classifier."""
    data = (
        Digits("reversed", digits.images, 9 - digits.labels),
        Digits("reversed", digits.images[:200], 9 - digits.labels[:200]),
    )
    config = lesson_5.Config(dry_run=True, device="cpu", batch_size=8, out=str(tmp_path / "run"))
    with pytest.raises(UserError, match="it was made for other data"):
        lesson_5.run(config, data)
    assert not (tmp_path / "run").exists()  # refused before anything is trained

    classifier = ReversedClassifier()
    monkeypatch.setattr(evaluation, "load_digit_classifier", lambda: pytest.fail("not the one passed in"))
    lesson_5.run(config, data, classifier)
    rows = read_json(tmp_path / "run" / "metrics.json")["sweep"]
    assert [row["reference"] for row in rows] == len(lesson_5.SWEEP) * ["reversed"]
    assert classifier.seen == [4000] + len(lesson_5.SWEEP) * [2]


def test_lesson_5_measures_most_samples_at_the_main_scale(tmp_path, monkeypatch, capsys):
    config = lesson_5.Config(device="cpu", out=str(tmp_path / "run"))
    run_dir = RunDir("lesson_05_cfg", config, "digits")
    drawn = []

    def sample(prompts, scale):
        drawn.append((scale, len(prompts)))
        return torch.rand(len(prompts), 3, 32, 32) * 2 - 1

    lesson_5.sweep(sample, 300, run_dir, mnist_reference())
    assert dict(drawn[: len(lesson_5.SWEEP)]) == {s: 300 if s == 3 else 200 for s in lesson_5.SWEEP}
    rows = read_json(tmp_path / "run" / "metrics.json")["sweep"]
    assert [row["n"] for row in rows] == [n for _, n in drawn[: len(rows)]]
    *_, last = capsys.readouterr().out.strip().splitlines()
    assert last.startswith("try next: python lesson_05_cfg/sample.py --checkpoint")
