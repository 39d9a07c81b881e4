"""Lesson 6's upsampling and inpainting networks, and the commands that use them."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run_command
from common.images import to_pixels
from common.training.run_dir import saved_config
from lesson_06_miniglide import evaluate, pipeline, sample, train
from lesson_06_miniglide.editing.inpaint_inputs import InpaintInputs
from lesson_06_miniglide.model import build_network, make_diffusion
from lesson_06_miniglide.networks.inpainting import expand_input_conv, inpainting_task, random_mask
from lesson_06_miniglide.networks.presets import PRESETS
from lesson_06_miniglide.networks.upsampler import (
    area_downsample,
    low_res_task,
    noise_augment,
    super_resolution_task,
)
from lesson_06_miniglide.pipeline import Cascade, MiniGlidePipeline, UpsamplerPipeline
from tests.test_lesson_06_training import SMALL, SMALL_TEXT, fill_zeros

PROCESS = make_diffusion(PRESETS["tiny_upsampler"])


def small_network(preset):
    torch.manual_seed(0)
    return fill_zeros(build_network(PRESETS[preset], SMALL, SMALL_TEXT, PROCESS.alpha_bar)).requires_grad_(
        False
    )


def some_text(network, n=2):
    return network.encode_text(torch.arange(4 * n).view(n, 4), torch.ones(n, 4, dtype=torch.bool))


# -- upsampling ----------------------------------------------------------------------------------------------


def test_low_resolution_pixels_are_means():
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(area_downsample(images, 16)[1, 2, 3, 5], images[1, 2, 12:16, 20:24].mean())


@pytest.mark.parametrize(("height", "width", "size"), [(40, 40, 16), (64, 40, 16), (8, 8, 16), (99, 99, 64)])
def test_a_size_that_does_not_divide_the_image_is_refused(height, width, size):
    """F.interpolate(mode="area") would let areas overlap, and their means would not be those of the image."""
    with pytest.raises(ValueError, match=f"{width}.* pixels cannot be divided into {size} x {size} areas"):
        area_downsample(torch.rand(1, 3, height, width), size)


def test_the_noise_of_a_level_is_that_of_the_timestep():
    torch.manual_seed(0)
    low_res, level = torch.full((3, 3, 64, 64), 0.5), torch.tensor([0, 300, 499])
    seen = noise_augment(PROCESS, low_res, level)["low_res"]
    alpha_bar = PROCESS.alpha_bar[level].float()
    assert torch.allclose(seen.mean((1, 2, 3)), 0.5 * alpha_bar.sqrt(), atol=0.04)
    assert torch.allclose(seen.std((1, 2, 3)), (1 - alpha_bar).sqrt(), rtol=0.03)
    assert (seen[0] - 0.5).abs().mean() < 1.5 / 127.5  # at level 0: one gray level


def test_an_upsampler_sees_its_low_resolution_image_and_the_noise_level():
    network = small_network("tiny_upsampler")
    x_t, t, text = torch.randn(2, 3, 64, 64), torch.tensor([10, 900]), some_text(network)
    low_res, level = torch.randn(2, 3, 16, 16), torch.tensor([0, 400])
    output = network(x_t, t, text, low_res=low_res, noise_level=level)
    assert output.shape == (2, 6, 64, 64)
    for changed in ({"low_res": low_res.flip(3)}, {"noise_level": level.flip(0)}):
        other = network(x_t, t, text, **{"low_res": low_res, "noise_level": level} | changed)
        assert ((output - other).abs().amax((1, 2, 3)) > 1e-3).all(), changed


def test_tasks_return_what_their_network_draws():
    x_0 = torch.rand(3, 3, 64, 64)
    small = type("Network", (), {"image_shape": (3, 16, 16)})
    target, inputs = low_res_task(PROCESS, small, x_0)
    assert target.shape == (3, 3, 16, 16) and inputs == {}
    target, inputs = super_resolution_task(PROCESS, None, x_0)
    assert target is x_0 and inputs["low_res"].shape == (3, 3, 16, 16) and inputs["noise_level"].max() < 500


# -- inpainting ----------------------------------------------------------------------------------------------


def test_masks_are_of_every_kind():
    rng = random.Random(0)
    masks = [random_mask(64, rng) for _ in range(400)]
    known = np.array([mask.mean() for mask in masks])
    assert masks[0].shape == (64, 64) and masks[0].dtype == bool
    assert 0.15 < (known == 0).mean() < 0.35 and 0.15 < (known == 0.5).mean() < 0.35
    halves = {tuple(mask[[0, 0, -1, -1], [0, -1, 0, -1]]) for mask in masks if mask.mean() == 0.5}
    assert len([h for h in halves if sum(h) == 2 and h[0] != h[3]]) == 4  # left, right, top, bottom
    assert known[known != 0].min() > 0.1 and known.max() < 1


def test_an_inpainting_network_starts_as_the_one_that_draws():
    base, network = small_network("tiny"), small_network("tiny_inpainting")
    network.load_state_dict(expand_input_conv(base.state_dict(), network))
    x_t, t, text = torch.randn(2, 3, 64, 64), torch.tensor([10, 900]), some_text(base)
    x_0, inputs = inpainting_task(PROCESS, network, torch.randn(2, 3, 64, 64))
    assert torch.allclose(network(x_t, t, text, **inputs), base(x_t, t, text), atol=1e-5)
    network.network.unet.conv_in.weight[:, 12:] += 0.1  # image and mask
    mask = inputs["inpaint_mask"]
    mask[:] = 0
    mask[..., :32] = 1
    output = network(x_t, t, text, inpaint_image=x_0, inpaint_mask=mask)
    hidden, shown = x_0.clone(), x_0.clone()
    hidden[..., 32:] += 1
    shown[..., :32] += 1
    assert torch.equal(network(x_t, t, text, inpaint_image=hidden, inpaint_mask=mask), output)
    other = network(x_t, t, text, inpaint_image=shown, inpaint_mask=mask)
    assert not torch.allclose(other, output, atol=1e-3)


# -- commands ------------------------------------------------------------------------------------------------


def run_train(*flags):
    run_command(train.main, train.Config, saved_config, argv=["--device", "cpu", "--dry-run", *flags])


def run_sample(*flags):
    run_command(
        sample.main, sample.Config, argv=["--device", "cpu", "--steps", "2", "--num-samples", "2", *flags]
    )
    return np.load(flags[-1])["images"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a run of each tiny preset, two steps long."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lesson_06_miniglide.image_data.captioned_images.NUM_SHAPES", 40)
        flags = ["--batch-size", "4", "--out"]
        run_train(*flags, str(folder / "tiny"))
        run_train("--preset", "tiny_small", *flags, str(folder / "small"))
        run_train("--preset", "tiny_upsampler", *flags, str(folder / "up"))
        init_from = ["--preset", "tiny_inpainting", "--init-from", str(folder / "tiny")]
        run_train(*init_from, *flags, str(folder / "inpaint"))
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / "image.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    Image.new("L", (30, 40)).save(folder / "black.png")
    Image.new("1", (10_000, 9_000)).save(folder / "large.png")
    whole = (folder / "image.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def test_a_cascade_draws_low_resolution_images_and_enlarges_them(trained, tmp_path):
    out = ["--out", str(tmp_path / "out.npz")]
    small = run_sample("--checkpoint", str(trained / "small"), *out)
    large = run_sample("--checkpoint", str(trained / "small"), "--upsampler", str(trained / "up"), *out)
    assert small.shape[1:] == (16, 16, 3) and large.shape[1:] == (64, 64, 3)
    assert large.shape[0] == small.shape[0] > 0


def test_the_command_draws_what_the_pipelines_draw(trained, tmp_path):
    def command(checkpoint, *flags):
        settings = ["--checkpoint", str(trained / checkpoint), "--prompt", "a red circle", "--seed", "3"]
        return run_sample(*settings, *flags, "--out", str(tmp_path / "out.npz"))

    base = MiniGlidePipeline.from_pretrained(str(trained / "tiny"), "cpu")
    small = MiniGlidePipeline.from_pretrained(str(trained / "small"), "cpu")
    upsampler = UpsamplerPipeline.from_pretrained(str(trained / "up"), "cpu")
    prompts = ["a red circle"] * 2
    assert (command("tiny") == to_pixels(base(prompts, 3.0, 2, seed=3).tensor)).all()
    expected = Cascade(small, upsampler, 50)(prompts, 2.0, 2, "ddim", seed=3).tensor
    flags = ["--upsampler", str(trained / "up"), "--noise-level", "50", "--sampler", "ddim"]
    assert (command("small", *flags, "--guidance-scale", "2") == to_pixels(expected)).all()


def test_a_cascade_is_evaluated_as_a_whole(trained, tmp_path):
    flags = ["--checkpoint", str(trained / "small"), "--num-samples", "4", "--steps", "2", "--device", "cpu"]
    flags += ["--upsampler", str(trained / "up"), "--noise-level", "50", "--out", str(tmp_path)]
    run_command(evaluate.main, evaluate.Config, argv=flags)
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert row["upsampler"] == str(trained / "up") and row["noise_level"] == 50
    drawn = next(tmp_path.glob("shapes_*/000000.npz"))
    assert np.load(drawn)["images"].shape == (4, 64, 64, 3)


def test_a_thin_stroke_of_a_mask_counts_at_any_size(trained, tmp_path):
    stroke = np.zeros((64, 64), np.uint8)
    stroke[21], stroke[:, 42] = 255, 255
    Image.fromarray(stroke).save(tmp_path / "stroke.png")
    for size in (16, 64, 128):
        keep_mask = InpaintInputs.load(trained / "image.png", tmp_path / "stroke.png", size).keep_mask
        assert (keep_mask == 0).any(3).all() and (keep_mask == 0).any(2).all()


def test_images_of_any_kind_are_read(tmp_path):
    """A mask is white where it is painted white, also on transparency; 16 bits are not all white."""
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    Image.fromarray(np.full((64, 64), 30000, np.uint16)).save(tmp_path / "gray.png")
    inputs = InpaintInputs.load(tmp_path / "gray.png", tmp_path / "mask.png", 64)
    assert inputs.keep_mask.mean() == 0.5
    assert inputs.image.mean().item() == pytest.approx(30000 / 32767.5 - 1, abs=0.01)


@pytest.mark.parametrize("checkpoint", ["inpaint", "tiny"])
def test_inpainting_keeps_what_is_black_in_the_mask(checkpoint, trained, tmp_path):
    flags = ["--checkpoint", str(trained / checkpoint), "--image", str(trained / "image.png")]
    flags += ["--mask", str(trained / "mask.png"), "--prompt", "a red circle"]
    images = run_sample(*flags, "--out", str(tmp_path / "out.npz"))
    image = np.array(Image.open(trained / "image.png"))
    assert (images[:, :, :32] == image[None, :, :32]).all()
    assert (images[:, :, 32:] != image[None, :, 32:]).mean() > 0.9


def test_the_noise_of_low_resolution_images_is_not_what_they_started_from(trained, monkeypatch):
    seen = []
    recording = lambda *args: seen.append(noise_augment(*args)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(pipeline, "noise_augment", recording)
    upsampler = UpsamplerPipeline.from_pretrained(str(trained / "up"), "cpu")
    small = torch.zeros(2, 3, 16, 16)
    upsampler.super_resolve(small, ["a", "b"], 499, steps=1, seed=0)
    noise = seen[0]["low_res"] / (1 - upsampler.process.alpha_bar[499]).sqrt().float()
    x_T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert noise.std() == pytest.approx(1, abs=0.1) and abs((noise * x_T).mean()) < 0.1


def test_a_low_strength_keeps_most_of_the_image(trained, tmp_path):
    flags = ["--checkpoint", str(trained / "tiny"), "--image", str(trained / "image.png")]
    flags += ["--prompt", "a red circle", "--sampler", "ddim", "--out", str(tmp_path / "out.npz")]
    image = np.array(Image.open(trained / "image.png")).astype(float)
    near, far = (np.abs(run_sample("--strength", share, *flags) - image).mean() for share in ("0.05", "1"))
    assert near < far / 2


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--checkpoint", "{}/up"], "name it with --upsampler"),
        (["--checkpoint", "{}/up", "--upsampler", "{}/up"], "name it with --upsampler"),
        (["--checkpoint", "{}/small", "--upsampler", "{}/tiny"], "--upsampler is not an upsampler"),
        (["--checkpoint", "{}/tiny", "--upsampler", "{}/up"], "--checkpoint draws 64x64"),
        (["--checkpoint", "{}/small", "--upsampler", "{}/up", "--noise-level", "500"], "from 0 to 499"),
        (
            ["--checkpoint", "{}/small", "--openai-upsampler", "x", "--vocabulary", "{}"],
            "--openai-upsampler enlarges 64x64 pixels",
        ),
        (["--checkpoint", "{}/tiny", "--mask", "{}/mask.png"], "--mask needs --image"),
        (["--checkpoint", "{}/tiny", "--image", "{}/none.png"], "none.png cannot be read as an image"),
        (["--checkpoint", "{}/tiny", "--image", "{}/image.png", "--strength", "0"], "--strength is 0"),
        (["--checkpoint", "{}/tiny", "--image", "{}/cut.png"], "cut.png cannot be read as an image"),
        (["--checkpoint", "{}/tiny", "--num-resamples", "0"], "--num-resamples is 0"),
        (["--checkpoint", "{}/tiny", "--times", "0"], "--num-resamples is 0"),
        (["--checkpoint", "{}/small", "--upsampler", "{}/none"], "--upsampler"),
        (["--checkpoint", "{}/tiny", "--image", "{}/image.png", "--mask", "{}/black.png"], "is black"),
        (["--checkpoint", "{}/tiny", "--image", "{}/large.png"], "could be decompression bomb"),
    ],
)
def test_errors_are_one_line(flags, line, trained, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(sample.main, sample.Config, argv=[flag.format(trained) for flag in flags])
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_weights_of_another_network_are_refused(trained, tmp_path, capsys):
    flags = ["--preset", "tiny_inpainting", "--init-from", str(trained / "small")]
    with pytest.raises(SystemExit, match="2"):
        run_train(*flags, "--out", str(tmp_path / "x"))
    assert "do not fit the network's settings" in capsys.readouterr().err and not (tmp_path / "x").exists()
