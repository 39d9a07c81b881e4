"""Figures: the trajectory, the animation, the labelled grid, the losses."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from common.images import to_uint8
from common.plotting import evenly_spaced, plot_grid, plot_losses, plot_trajectory, sampling_frames, save_gif
from common.training.metrics_csv import downsample_metrics, read_metrics, write_metrics
from common.training.run_dir import reference_rows
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_02_improved_ddpm.ddim import ddim_sample


@pytest.fixture(scope="module")
def steps():
    process = GaussianDiffusion(linear_betas(100)).respace_evenly(20)
    return list(ddim_sample(process, lambda x_t, t: x_t, torch.randn(4, 3, 8, 8)))


def test_trajectory_shows_x_t_above_the_prediction(steps, tmp_path):
    figure = plot_trajectory(steps, columns=5)
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels[0].endswith("19") and labels[-1].endswith("0") and len(labels) == 5
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["x_t", "predicted x_0"]
    figure.savefig(tmp_path / "trajectory.png")


def test_animation_ends_with_the_samples(steps, tmp_path):
    frames = sampling_frames(steps, columns=2, count=6)
    save_gif(tmp_path / "a.gif", frames, scale=1)
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames >= 7 and gif.size == (frames[0].shape[1], frames[0].shape[0])
    last = to_uint8(steps[-1].x_prev[0]).permute(1, 2, 0)
    assert np.array_equal(frames[-1][1:9, 1:9], last)


def test_an_animation_can_have_a_label_above_each_column(steps, tmp_path):
    frames = sampling_frames(steps, columns=4, count=6)
    save_gif(tmp_path / "a.gif", frames, scale=3, column_labels=["a red seven", "红", "two", ""])
    height, width, _ = frames[0].shape
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.size == (3 * width, 3 * height + 36)
        header = np.array(gif.convert("L"))[:36]
    dark = [(part < 128).any() for part in np.array_split(header, 4, axis=1)]
    assert dark[0] and dark[2] and not dark[3]


def test_evenly_spaced_keeps_the_first_and_the_last():
    assert evenly_spaced(range(10), 4) == [0, 3, 6, 9]
    assert evenly_spaced(range(3), 40) == [0, 1, 2]


def test_grid_has_a_cell_for_each_image():
    figure = plot_grid(
        torch.zeros(5, 1, 8, 8), columns=2, row_labels=["a", "b", "c"], column_labels=["x", "y"]
    )
    shown = figure.axes[0].images[0].get_array()
    assert shown.shape == (3 * 10 + 2, 2 * 10 + 2, 3)


def test_labels_are_shown_as_they_are_written():
    odd = ["a $5_{ or a $6 note", "word " * 2000]
    figure = plot_grid(torch.zeros(2, 3, 8, 8), 1, row_labels=odd, column_labels=odd[:1])
    figure.savefig(io.BytesIO())
    assert [label.get_text()[:7] for label in figure.axes[0].get_yticklabels()] == ["a $5_{ ", "word wo"]
    assert figure.get_size_inches()[0] < 10


STEPS_PER_ROW = 20


def test_a_run_is_plotted_next_to_the_downsampled_reference(tmp_path):
    losses = [1 / step for step in range(1, 2 * STEPS_PER_ROW + 6)]
    lines = [f"{step},0.1,{loss},1,0.001,9," for step, loss in enumerate(losses, 1)]
    header = "step,minutes,loss,grad_norm,learning_rate,images_per_second,validation_loss"
    (tmp_path / "long.csv").write_text("\n".join([header, *lines[:-1], lines[-1] + "0.5"]))
    (tmp_path / "short.csv").write_text("\n".join([header, *lines[:30]]))
    shorter = downsample_metrics(read_metrics(tmp_path / "long.csv"), STEPS_PER_ROW)
    write_metrics(tmp_path / "downsampled.csv", shorter)
    rows = read_metrics(tmp_path / "downsampled.csv")
    assert [row["step"] for row in rows] == [STEPS_PER_ROW, 2 * STEPS_PER_ROW, 2 * STEPS_PER_ROW + 5]
    assert rows[1]["loss"] == pytest.approx(np.mean(losses[STEPS_PER_ROW : 2 * STEPS_PER_ROW]), rel=1e-5)
    assert [row.get("validation_loss") for row in rows] == [None, None, 0.5]
    figure = plot_losses(read_metrics(tmp_path / "short.csv"), reference_rows(tmp_path / "downsampled.csv"))
    plotted = {line.get_label(): line for line in figure.axes[0].lines}
    reference = plotted["training of the pretrained weights"]
    assert list(reference.get_xdata()) == [STEPS_PER_ROW] and reference.get_ydata()[0] == rows[0]["loss"]


def test_a_run_without_a_reference_is_plotted_alone(tmp_path):
    assert reference_rows(None) is None and reference_rows(tmp_path / "none.csv") is None
    rows = [{"step": step, "loss": 1 / step, "learning_rate": 0.1} for step in range(1, 4)]
    labels = [line.get_label() for line in plot_losses(rows, None).axes[0].lines]
    assert "training of the pretrained weights" not in labels
