"""Data: what comes in, in which range and order, and the pairs that training never sees."""

import pytest
import torch

from common.captions import (
    CAPTIONS,
    COLOURS,
    HELD_OUT,
    NO_COLOUR,
    WORDS,
    CaptionedDigits,
    balanced_prompts,
    held_out_mask,
    paint,
)
from common.classifier import judge
from common.command import UserError
from common.data import Digits, load_digits, pad, to_float, to_uint8
from common.drawn import draw_digits
from common.evaluation import brightness, read_colours
from common.training import batch_indices


@pytest.fixture(scope="module")
def drawn():
    labels = torch.arange(1000) % 10
    return Digits("drawn", pad(draw_digits(labels, torch.Generator().manual_seed(3))), labels)


def test_the_two_conversions_undo_each_other():
    values = torch.arange(256, dtype=torch.uint8)
    assert to_float(values).min() == -1 and to_float(values).max() == 1
    assert torch.equal(to_uint8(to_float(values)), values)
    assert to_uint8(torch.tensor([-7.0, 7.0])).tolist() == [0, 255]


def test_drawn_digits_are_reproducible_varied_and_legible(drawn):
    again = pad(draw_digits(drawn.labels, torch.Generator().manual_seed(3)))
    assert torch.equal(again, drawn.images)
    assert drawn.images.shape == (1000, 1, 32, 32)
    assert drawn.images.flatten(1).unique(dim=0).shape[0] == 1000
    read = judge().read(drawn.images)[1].argmax(-1)  # the judge has seen MNIST only
    assert (read == drawn.labels).float().mean() > 0.8


def test_real_mnist(real_data):
    digits = load_digits("mnist", real_data, train=False)
    assert digits.name == "mnist" and digits.images.shape == (10_000, 1, 32, 32)
    assert digits.images.min() == -1 and digits.images.max() == 1
    assert (digits.images[:, :, :2] == -1).all()  # the border
    read = judge().read(digits.images[:2000])[1].argmax(-1)
    assert (read == digits.labels[:2000]).float().mean() > 0.99


def test_missing_mnist_is_said(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"--data-dir .* holds no MNIST"):
        load_digits("auto", tmp_path)
    monkeypatch.setenv("LESSONS_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"LESSONS_DATA .* holds no MNIST"):
        load_digits("mnist")
    with pytest.raises(UserError, match="auto, mnist, drawn"):
        load_digits("cifar")


def no_network(*args, **kwargs):
    if kwargs.get("download"):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")
    raise RuntimeError("Dataset not found")


def test_without_network_auto_draws_and_mnist_fails(monkeypatch, capsys):
    monkeypatch.delenv("LESSONS_DATA", raising=False)
    monkeypatch.setattr("torchvision.datasets.MNIST", no_network)
    monkeypatch.setattr("common.data.NUM_DRAWN", 50)
    assert load_digits("auto").name == "drawn"
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "drawn digits" in said and "could not be downloaded" in said
    with pytest.raises(UserError, match="could not be downloaded"):
        load_digits("mnist")


def test_held_out_pairs():
    assert len(HELD_OUT) == 10 and set(HELD_OUT) == set(COLOURS)
    assert held_out_mask().sum(1).tolist() == [1] * 10


def test_training_never_shows_a_held_out_pair(drawn):
    torch.manual_seed(0)
    data = CaptionedDigits(drawn)
    for _ in range(20):
        indices = torch.randint(len(data), (500,))
        images, captions = data.batch(indices)
        colours = read_colours(images)
        assert (colours >= 0).all()
        assert not held_out_mask()[drawn.labels[indices], colours].any()
        for label, colour, caption in list(zip(drawn.labels[indices].tolist(), colours.tolist(), captions))[
            :50
        ]:
            words = CAPTIONS[caption].split()
            assert WORDS[label] in words or str(label) in words
            named = [c for c in COLOURS if c in words]
            assert named in ([], [COLOURS[colour]])


def test_painting_keeps_the_digit_and_its_colour(drawn):
    for index in range(len(COLOURS)):
        painted = paint(drawn.images[:50], torch.full((50,), index))
        torch.testing.assert_close(brightness(painted), drawn.images[:50], rtol=0, atol=1e-5)
        assert (read_colours(painted) == index).all()
    half = paint(drawn.images[:50], torch.full((50,), 0))
    half[:, :, 16:] = paint(drawn.images[:50], torch.full((50,), 4))[:, :, 16:]
    assert (read_colours(half) == -1).float().mean() > 0.5  # two-coloured digits have no one colour


def test_captions_read_well():
    assert len(CAPTIONS) == 10 * (NO_COLOUR + 1) * 4
    assert {"a seven", "the digit 7", "a red seven", "the digit 7 in red", "an 8", "an orange 1"} <= set(
        CAPTIONS
    )
    assert {"a one", "an eight"} <= set(CAPTIONS) and "an one" not in CAPTIONS


def test_balanced_prompts_cover_every_pair_and_wording():
    prompts, digits, colours = balanced_prompts(280)
    pairs = torch.bincount(digits * len(COLOURS) + colours)
    assert pairs.tolist() == [4] * 70
    assert len(set(prompts)) == 280
    for prompt, digit, colour in zip(prompts, digits.tolist(), colours.tolist()):
        assert COLOURS[colour] in prompt and (WORDS[digit] in prompt or str(digit) in prompt)


def test_every_example_once_a_pass_in_a_new_order():
    passes = torch.cat([batch_indices(step, 10, 4, seed=0) for step in range(5)]).view(2, 10)
    assert passes.sort(1).values.tolist() == [list(range(10))] * 2
    assert not torch.equal(passes[0], passes[1])
    assert not torch.equal(passes[0, :4], batch_indices(0, 10, 4, seed=1))
