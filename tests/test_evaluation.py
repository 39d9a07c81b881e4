"""Do the numbers measure what they say? FID must rise with every kind of damage, and agree with the closed
form.
"""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from common.captions import COLOURS, balanced_prompts, paint
from common.classifier import judge
from common.data import Digits, pad
from common.drawn import draw_digits
from common.evaluation import diversity, evaluate, fid, kid, mnist_reference, real_sample, reference_of


@pytest.fixture(scope="module")
def digits():
    labels = torch.arange(4000) % 10
    return Digits("drawn", pad(draw_digits(labels, torch.Generator().manual_seed(0))), labels)


@pytest.fixture(scope="module")
def reference(digits):
    return reference_of(digits, held_back=1000)


@pytest.fixture(scope="module")
def fresh():
    """Other drawn digits, of the same kind as the reference."""
    return pad(draw_digits(torch.arange(1000) % 10, torch.Generator().manual_seed(1)))


def fid_of(images, reference):
    return fid(judge().read(images)[0], reference)


def test_fid_rises_with_every_kind_of_damage(fresh, reference):
    clean = fid_of(fresh, reference)
    assert clean < 3 * fid(real_sample(reference, 1000), reference)
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
        values = [clean, *(fid_of(images, reference) for images in stages)]
        assert values == sorted(values) and values[1] > 1.5 * clean, f"{name}: {values}"


def test_fid_is_the_frechet_distance_of_gaussians(reference):
    """|mean difference|^2 + tr(A + B - 2 (A B)^(1/2)), with numpy's eigenvalues."""
    features = reference.features[:500].double() * 1.3 + 0.4
    a, b = np.cov(features.numpy().T), reference.covariance.numpy()
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    distance = np.square(features.mean(0).numpy() - reference.mean.numpy()).sum()
    assert fid(features, reference) == pytest.approx(
        distance + np.trace(a) + np.trace(b) - 2 * root, rel=1e-3
    )


def test_kid_is_near_zero_for_the_same_images_and_rises(fresh, reference):
    features = judge().read(fresh)[0]
    same, other = kid(features, reference), kid(features + 0.5, reference)
    assert abs(same) < 0.1 * other


def test_shipped_mnist_statistics_agree_with_mnist(real_data):
    from common.data import load_digits

    shipped, test = mnist_reference(), load_digits("mnist", real_data, train=False)
    features, _ = judge().read(test.images)
    torch.testing.assert_close(features, shipped.features, rtol=2e-2, atol=2e-2)
    assert torch.equal(test.labels, shipped.labels)
    assert fid(shipped.features, shipped) < 1


def test_the_floor_falls_with_n():
    reference = mnist_reference()
    assert fid(real_sample(reference, 5000), reference) < fid(real_sample(reference, 300), reference)


def test_a_part_of_the_real_images_has_all_digits(reference):
    """Drawn digits come in turns, so that every second one is even."""
    half, whole = (fid(real_sample(reference, n), reference) for n in (500, 1000))
    assert half < 3 * whole


def test_diversity_of_real_is_one_and_of_copies_zero(digits, reference):
    features = judge().read(digits.images[:1000])[0]
    assert diversity(features, digits.labels[:1000], reference) == pytest.approx(1, abs=0.15)
    assert diversity(features[:10].repeat(5, 1), torch.arange(10).repeat(5), reference) == pytest.approx(
        0, abs=1e-6
    )


def test_prompt_and_colour_accuracy(digits, reference):
    _, wanted, colours = balanced_prompts(700)
    place = torch.arange(700) // 10 * 10 + wanted  # the labels run 0, 1 .. 9, 0 ..
    images = digits.images[place]
    right = evaluate(paint(images, colours), reference, wanted, colours)
    assert right["colour_accuracy"] == 1 and right["digit_accuracy"] > 0.85 and right["n"] == 700
    assert right["held_out_both_accuracy"] > 0.7 and right["fid"] > 0 and right["fid_floor"] > 0
    wrong = evaluate(paint(images, (colours + 1) % len(COLOURS)), reference, (wanted + 1) % 10, colours)
    assert wrong["colour_accuracy"] == 0 and wrong["digit_accuracy"] < 0.1
