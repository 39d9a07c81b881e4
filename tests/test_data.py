"""Digits and captions: range, order, and the pairs of digit and colour that are held out."""

import pytest
import torch

from common.digits.captions import (
    CAPTIONS,
    COLOURS,
    HELD_OUT,
    NO_COLOUR,
    WORDS,
    CaptionedDigits,
    balanced_prompts,
    colourize,
    held_out_mask,
)
from common.digits.classifier import load_digit_classifier
from common.digits.evaluation import max_channel, read_colours
from common.digits.mnist import Digits, load_digits, load_splits, preprocess
from common.digits.synthetic import render_digits
from common.errors import UserError
from common.images import to_float, to_pixels, to_tensor, to_uint8
from common.training.trainer import batch_indices


@pytest.fixture(scope="module")
def digits():
    labels = torch.arange(1000) % 10
    images = preprocess(render_digits(labels, torch.Generator().manual_seed(3)))
    return Digits("synthetic", images, labels)


def test_conversions_to_and_from_uint8_are_inverse():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]
    images = torch.randint(256, (2, 3, 4, 5), dtype=torch.uint8)
    pixels = to_pixels(to_float(images))
    assert pixels.shape == (2, 4, 5, 3) and torch.equal(to_uint8(to_tensor(pixels)), images)


def test_synthetic_digits_are_reproducible_varied_and_legible(digits):
    again = preprocess(render_digits(digits.labels, torch.Generator().manual_seed(3)))
    assert torch.equal(again, digits.images)
    assert digits.images.shape == (1000, 1, 32, 32)
    assert digits.images.flatten(1).unique(dim=0).shape[0] == 1000
    predicted = load_digit_classifier().predict(digits.images)[1].argmax(-1)  # it was trained on MNIST only
    assert (predicted == digits.labels).float().mean() > 0.8


def test_real_mnist(real_data):
    digits = load_digits("mnist", str(real_data), train=False)
    assert digits.name == "mnist" and digits.images.shape == (10_000, 1, 32, 32)
    assert digits.images.min() == -1 and digits.images.max() == 1
    assert (digits.images[:, :, :2] == -1).all()  # the border
    predicted = load_digit_classifier().predict(digits.images[:2000])[1].argmax(-1)
    assert (predicted == digits.labels[:2000]).float().mean() > 0.99


def test_missing_mnist_is_an_error_if_a_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--data-dir .* holds no MNIST"):
        load_digits("auto", str(tmp_path))
    monkeypatch.setenv("LESSONS_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"LESSONS_DATA .* holds no MNIST"):
        load_digits("mnist")
    with pytest.raises(UserError, match="auto, mnist, synthetic"):
        load_digits("cifar")


def no_network(*args, **kwargs):
    if kwargs.get("download"):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
    raise RuntimeError("Dataset not found")


def test_without_network_auto_is_synthetic_and_mnist_fails(monkeypatch, capsys):
    monkeypatch.delenv("LESSONS_DATA", raising=False)
    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    monkeypatch.setattr("common.digits.mnist.NUM_SYNTHETIC", 50)
    assert load_digits("auto").name == "synthetic"
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert "synthetic digits" in printed and "could not be downloaded" in printed
    with pytest.raises(UserError, match="could not be downloaded"):
        load_digits("mnist")


def test_splits_differ_and_the_earlier_name_of_synthetic_is_accepted(monkeypatch):
    monkeypatch.setattr("common.digits.mnist.NUM_SYNTHETIC", 50)
    train, validation = load_splits("synthetic")
    assert (len(train), len(validation)) == (50, 10)
    assert not any(torch.equal(image, train.images[i % 10]) for i, image in enumerate(validation.images))
    earlier = load_digits("drawn")
    assert earlier.name == "synthetic" and torch.equal(earlier.images, train.images)


def test_three_channels_are_three_equal_ones(monkeypatch):
    monkeypatch.setattr("common.digits.mnist.NUM_SYNTHETIC", 20)
    gray, rgb = load_digits("synthetic"), load_digits("synthetic", channels=3)
    assert rgb.images.shape == (20, 3, 32, 32)
    assert all(torch.equal(rgb.images[:, c], gray.images[:, 0]) for c in range(3))


def test_held_out_pairs():
    assert len(HELD_OUT) == 10 and set(HELD_OUT) == set(COLOURS)
    assert held_out_mask().sum(1).tolist() == [1] * 10


def test_training_never_shows_a_held_out_pair(digits):
    torch.manual_seed(0)
    data = CaptionedDigits(digits)
    for _ in range(20):
        indices = torch.randint(len(data), (500,))
        images, captions = data.batch(indices)
        labels, colours = digits.labels[indices], read_colours(images)
        assert (colours >= 0).all()
        assert not held_out_mask()[labels, colours].any()
        for label, colour, caption in list(zip(labels.tolist(), colours.tolist(), captions))[:50]:
            words = CAPTIONS[caption].split()
            assert WORDS[label] in words or str(label) in words
            named = [c for c in COLOURS if c in words]
            assert named in ([], [COLOURS[colour]])


def test_colouring_keeps_the_digit_and_its_colour(digits):
    for index in range(len(COLOURS)):
        coloured = colourize(digits.images[:50], torch.full((50,), index))
        torch.testing.assert_close(max_channel(coloured), digits.images[:50], rtol=0, atol=1e-5)
        assert (read_colours(coloured) == index).all()
    half = colourize(digits.images[:50], torch.full((50,), 0))
    half[:, :, 16:] = colourize(digits.images[:50], torch.full((50,), 4))[:, :, 16:]
    assert (read_colours(half) == -1).float().mean() > 0.5  # no colour dominates in two-coloured digits


def test_captions_read_well():
    assert len(CAPTIONS) == 10 * (NO_COLOUR + 1) * 4
    assert {"a seven", "the digit 7", "a red seven", "the digit 7 in red", "an 8", "an orange 1"} <= set(
        CAPTIONS
    )
    assert {"a one", "an eight"} <= set(CAPTIONS) and "an one" not in CAPTIONS


def test_balanced_prompts_cover_every_pair_and_phrasing():
    prompts, digits, colours = balanced_prompts(280)
    pairs = torch.bincount(digits * len(COLOURS) + colours)
    assert pairs.tolist() == [4] * 70
    assert len(set(prompts)) == 280
    for prompt, digit, colour in zip(prompts, digits.tolist(), colours.tolist()):
        assert COLOURS[colour] in prompt and (WORDS[digit] in prompt or str(digit) in prompt)


def test_every_example_once_per_epoch_in_a_new_order():
    epochs = torch.cat([batch_indices(step, 10, 4, seed=0) for step in range(5)]).view(2, 10)
    assert epochs.sort(1).values.tolist() == [list(range(10))] * 2
    assert not torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0, :4], batch_indices(0, 10, 4, seed=1))
