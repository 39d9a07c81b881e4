"""Pictures: the strip along a trajectory, the animation, the labelled grid."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import load_digits, to_uint8
from common.pictures import frames_of, label_grid, save_gif, trajectory_strip
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_02_improved_ddpm.ddim import ddim_sample


@pytest.fixture(scope="module")
def steps():
    process = GaussianDiffusion(linear_betas(100)).evenly(20)
    return list(ddim_sample(process, lambda x_t, t: x_t, torch.randn(4, 3, 8, 8)))


def test_strip_shows_x_t_above_the_prediction(steps, tmp_path):
    figure = trajectory_strip(steps, columns=5)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[0].endswith("19") and labels[-1].endswith("0") and len(labels) == 5
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["x_t", "predicted x_0"]
    figure.savefig(tmp_path / "strip.png")


def test_animation_ends_with_the_samples(steps, tmp_path):
    frames = frames_of(steps, columns=2, count=6)
    save_gif(tmp_path / "a.gif", frames, scale=1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames >= 7 and gif.size == (frames[0].shape[1], frames[0].shape[0])
    last = to_uint8(steps[-1].x_prev[0]).permute(1, 2, 0)
    assert np.array_equal(frames[-1][1:9, 1:9], last)


def test_grid_has_a_cell_for_each_image():
    figure = label_grid(
        torch.zeros(5, 1, 8, 8), columns=2, row_labels=["a", "b", "c"], column_labels=["x", "y"]
    )
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (3 * 10 + 2, 2 * 10 + 2, 3)


def test_three_channels_are_three_equal_ones(monkeypatch):
    monkeypatch.setattr("common.data.NUM_DRAWN", 20)
    gray, rgb = load_digits("drawn"), load_digits("drawn", channels=3)
    assert rgb.images.shape == (20, 3, 32, 32)
    assert all(torch.equal(rgb.images[:, c], gray.images[:, 0]) for c in range(3))
