"""KID's standard error against the spread of KID over many independent sets."""

import numpy as np
import pytest
import torch

from common import metrics
from common.digits import evaluation
from common.digits.classifier import DigitClassifier
from common.digits.evaluation import Reference, evaluate, format_metrics
from common.metrics import kid_between, kid_with_error, mmd_variance
from common.results.report import COLUMN_TITLES, markdown_table
from lesson_06_miniglide.scoring.features import fid_kid, pixels_8x8


def draws(n, m, shift, repetitions):
    """Independent pairs of sets of Gaussian features in four dimensions."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(repetitions):
        yield torch.randn(n, 4, generator=generator), torch.randn(m, 4, generator=generator) + shift


def unbiased_mmd(x, y):
    def kernel(a, b):
        return (a.double() @ b.double().T / 4 + 1) ** 3

    within = [(kernel(z, z).sum() - kernel(z, z).trace()) / (len(z) * (len(z) - 1)) for z in (x, y)]
    return (within[0] + within[1] - 2 * kernel(x, y).mean()).item()


@pytest.mark.parametrize(
    "n, m, shift, low, high",
    [
        (40, 40, 0.0, 1, 1.35),  # equal distributions: all of the variance is that of pairs
        (40, 40, 0.7, 0.87, 1.15),
        (60, 15, 0.3, 0.87, 1.15),
        (6, 5, 1.0, 0.87, 1.15),
    ],
)
def test_the_variance_is_that_of_many_sets(n, m, shift, low, high):
    """A standard deviation of 600 numbers with heavy tails is itself uncertain by about 6 %."""
    pairs = list(draws(n, m, shift, 600))
    spread = np.std([unbiased_mmd(*pair) for pair in pairs], ddof=1)
    assert low < np.sqrt(np.mean([mmd_variance(*pair) for pair in pairs])) / spread < high


def test_the_error_contains_that_of_random_subsets(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 12)
    monkeypatch.setattr(metrics, "KID_SUBSETS", 3)
    kids, errors = np.array([kid_with_error(*pair) for pair in draws(60, 40, 0.5, 200)]).T
    assert np.sqrt((errors**2).mean()) == pytest.approx(kids.std(ddof=1), rel=0.2)
    assert kids.mean() == pytest.approx(unbiased_mmd(*next(draws(2000, 2000, 0.5, 1))), rel=0.2)


def test_a_large_set_is_measured_by_some_of_its_features():
    """The order of the features, for instance by class, does not matter."""
    x, y = next(draws(1500, 1500, 0.5, 1))
    sorted_by_one = mmd_variance(x[x[:, 0].argsort()], y[y[:, 0].argsort()])
    assert sorted_by_one == pytest.approx(mmd_variance(x, y), rel=0.2)


def test_few_features_have_a_distance_and_no_error():
    x, y = next(draws(9, 3, 0.5, 1))
    assert kid_between(x, y) == kid_with_error(x, y).kid
    assert np.isfinite(kid_with_error(x, y).kid) and np.isnan(kid_with_error(x, y).kid_error)


class Classifier(DigitClassifier):
    """Features of an image are four of its pixels."""

    def predict(self, images, batch_size=1000):
        return images[:, 0, 0, :4], torch.eye(10)[torch.arange(len(images)) % 10]


def test_metrics_of_digits_and_the_printed_line_have_it(monkeypatch):
    real, fake = next(draws(50, 30, 0.5, 1))
    images = torch.zeros(30, 1, 32, 32)
    images[:, 0, 0, :4] = fake.clamp(-1, 1)
    labels, covariance = torch.arange(50) % 10, torch.eye(4).double()
    reference = Reference("real", torch.zeros(4).double(), covariance, real, labels, torch.ones(50))
    monkeypatch.setattr(evaluation, "load_digit_classifier", lambda: pytest.fail("not the one passed in"))
    result = evaluate(images, reference, classifier=Classifier())
    expected = kid_with_error(real, fake.clamp(-1, 1))
    assert (result["kid"], result["kid_error"]) == expected and expected.kid_error > 0
    assert f"kid {expected.kid:.3g}  kid_error {expected.kid_error:.3g}" in format_metrics(result)
    assert evaluate(images[:3], reference, classifier=Classifier())["kid_error"] is None


def test_metrics_of_larger_images_have_it():
    images = np.random.default_rng(0).integers(0, 256, (12, 64, 64, 3), np.uint8)
    result = fid_kid(images[:6], images[6:], pixels_8x8)
    features = pixels_8x8(images)
    assert (result["kid"], result["kid_error"]) == kid_with_error(features[6:], features[:6])
    assert fid_kid(images[:3], images[6:], pixels_8x8)["kid_error"] is None


def test_tables_cope_with_rows_that_lack_it():
    rows = [{"n": 100, "kid": 0.17}, {"n": 100, "kid": 0.2, "kid_error": 0.044}]
    lines = markdown_table(rows, COLUMN_TITLES, ["n", "kid", "kid_error"]).splitlines()
    assert lines[0] == "| n | KID | error of KID |"
    assert lines[2:] == ["| 100 | 0.17 | - |", "| 100 | 0.20 | 0.04 |"]
    assert "error" not in markdown_table(rows[:1], COLUMN_TITLES)
