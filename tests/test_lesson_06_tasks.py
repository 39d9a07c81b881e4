"""What lesson 6's networks do besides drawing: enlarging, filling holes; and the commands that use them."""

import json
import random

import numpy as np
import pytest
import torch
from PIL import Image

from common.command import run_command
from common.runs import saved_config
from lesson_06_miniglide import evaluate, generate, sample, train
from lesson_06_miniglide.generate import Generator
from lesson_06_miniglide.inpainting import InpaintingUNet, Repainting, inpaint, random_mask, widened
from lesson_06_miniglide.presets import new_diffusion
from lesson_06_miniglide.sketch import PatchSketchingUNet
from lesson_06_miniglide.upsampler import UpsamplingUNet, draw_small, enlarge, noised, shrink
from tests.test_lesson_06_training import SMALL, SMALL_TEXT, filled

PROCESS = new_diffusion(1000, "tiny_upsampler")


def some_text(network, n=2):
    return network.encode_text(torch.arange(4 * n).view(n, 4), torch.ones(n, 4, dtype=torch.bool))


# -- enlarging -----------------------------------------------------------------------------------------------


def test_small_pictures_are_means():
    images = torch.rand(2, 3, 64, 64)
    assert torch.allclose(shrink(images, 16)[1, 2, 3, 5], images[1, 2, 12:16, 20:24].mean())


def test_noise_of_a_level_is_as_strong_as_that_of_the_timestep():
    torch.manual_seed(0)
    low_res, level = torch.full((3, 3, 64, 64), 0.5), torch.tensor([0, 300, 499])
    seen = noised(PROCESS, low_res, level)["low_res"]
    alpha_bar = PROCESS.alpha_bar[level].float()
    assert torch.allclose(seen.mean((1, 2, 3)), 0.5 * alpha_bar.sqrt(), atol=0.04)
    assert torch.allclose(seen.std((1, 2, 3)), (1 - alpha_bar).sqrt(), rtol=0.03)
    assert (seen[0] - 0.5).abs().mean() < 1.5 / 127.5  # level 0 is a gray level


def test_an_upsampler_sees_its_small_picture_and_the_level():
    torch.manual_seed(0)
    network = filled(UpsamplingUNet(SMALL, SMALL_TEXT, PROCESS.alpha_bar)).requires_grad_(False)
    x_t, t, text = torch.randn(2, 3, 64, 64), torch.tensor([10, 900]), some_text(network)
    low_res, level = torch.randn(2, 3, 16, 16), torch.tensor([0, 400])
    output = network(x_t, t, text, low_res=low_res, level=level)
    assert output.shape == (2, 6, 64, 64)
    for changed in ({"low_res": low_res.flip(3)}, {"level": level.flip(0)}):
        other = network(x_t, t, text, **{"low_res": low_res, "level": level} | changed)
        assert ((output - other).abs().amax((1, 2, 3)) > 1e-3).all(), changed


def test_tasks_draw_what_their_network_draws():
    x_0 = torch.rand(3, 3, 64, 64)
    small = type("Network", (), {"image_shape": (3, 16, 16)})
    drawn, seen = draw_small(PROCESS, small, x_0)
    assert drawn.shape == (3, 3, 16, 16) and seen == {}
    drawn, seen = enlarge(PROCESS, None, x_0)
    assert drawn is x_0 and seen["low_res"].shape == (3, 3, 16, 16) and seen["level"].max() < 500


# -- filling holes -------------------------------------------------------------------------------------------


def test_masks_are_of_every_kind():
    rng = random.Random(0)
    masks = [random_mask(64, rng) for _ in range(400)]
    known = np.array([mask.mean() for mask in masks])
    assert masks[0].shape == (64, 64) and masks[0].dtype == bool
    assert 0.15 < (known == 0).mean() < 0.35 and 0.15 < (known == 0.5).mean() < 0.35
    halves = {tuple(mask[[0, 0, -1, -1], [0, -1, 0, -1]]) for mask in masks if mask.mean() == 0.5}
    assert len([h for h in halves if sum(h) == 2 and h[0] != h[3]]) == 4  # left, right, top, bottom
    assert known[known != 0].min() > 0.1 and known.max() < 1


def test_a_network_that_fills_holes_begins_as_the_one_that_draws():
    torch.manual_seed(0)
    base = filled(PatchSketchingUNet(SMALL, SMALL_TEXT, PROCESS.alpha_bar)).requires_grad_(False)
    network = InpaintingUNet(SMALL, SMALL_TEXT, PROCESS.alpha_bar).eval()
    network.load_state_dict(widened(base.state_dict(), network))
    x_t, t, text = torch.randn(2, 3, 64, 64), torch.tensor([10, 900]), some_text(base)
    x_0, seen = inpaint(PROCESS, network, torch.randn(2, 3, 64, 64))
    with torch.no_grad():
        assert torch.allclose(network(x_t, t, text, **seen), base(x_t, t, text), atol=1e-5)
        filled(network).requires_grad_(False).unet.first.weight[:, 12:25] += 0.1  # image and mask
        seen["mask"][:] = 0
        seen["mask"][..., :32] = 1
        output = network(x_t, t, text, **seen)
        hidden, shown = x_0.clone(), x_0.clone()
        hidden[..., 32:] += 1
        shown[..., :32] += 1
        assert torch.equal(network(x_t, t, text, image=hidden, mask=seen["mask"]), output)
        assert not torch.allclose(network(x_t, t, text, image=shown, mask=seen["mask"]), output, atol=1e-3)


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
    """The folder of a run of each tiny preset, two steps long."""
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lesson_06_miniglide.captioned_images.NUM_DRAWN", 40)
        flags = ["--batch-size", "4", "--out"]
        run_train(*flags, str(folder / "tiny"))
        run_train("--preset", "tiny_small", *flags, str(folder / "small"))
        run_train("--preset", "tiny_upsampler", *flags, str(folder / "up"))
        start_from = ["--preset", "tiny_inpainting", "--start-from", str(folder / "tiny")]
        run_train(*start_from, *flags, str(folder / "inpaint"))
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


def test_a_cascade_draws_small_and_enlarges(trained, tmp_path):
    out = ["--out", str(tmp_path / "out.npz")]
    small = run_sample("--checkpoint", str(trained / "small"), *out)
    large = run_sample("--checkpoint", str(trained / "small"), "--upsampler", str(trained / "up"), *out)
    assert small.shape[1:] == (16, 16, 3) and large.shape[1:] == (64, 64, 3)
    assert large.shape[0] == small.shape[0] > 0


def test_a_cascade_is_measured_whole(trained, tmp_path):
    flags = ["--checkpoint", str(trained / "small"), "--num-samples", "4", "--steps", "2", "--device", "cpu"]
    flags += ["--upsampler", str(trained / "up"), "--noise-level", "50", "--out", str(tmp_path)]
    run_command(evaluate.main, evaluate.Config, argv=flags)
    (row,) = json.loads((tmp_path / "evaluation.json").read_text())["rows"]
    assert row["upsampler"] == str(trained / "up") and row["noise_level"] == 50
    drawn = next(tmp_path.glob("all_right_*/000000.npz"))
    assert np.load(drawn)["images"].shape == (4, 64, 64, 3)


def test_a_thin_stroke_of_a_mask_is_drawn_at_any_size(trained, tmp_path):
    stroke = np.zeros((64, 64), np.uint8)
    stroke[21], stroke[:, 42] = 255, 255
    Image.fromarray(stroke).save(tmp_path / "stroke.png")
    for size in (16, 64, 128):
        known = Repainting.load(trained / "image.png", tmp_path / "stroke.png", size).known
        assert (known == 0).any(3).all() and (known == 0).any(2).all()


def test_pictures_of_any_kind_are_read(tmp_path):
    """A mask is white where it is painted white, also on a transparent ground; 16 bits are not all white."""
    mask = Image.new("RGBA", (64, 64), (255, 255, 255, 0))
    mask.paste((255, 255, 255, 255), (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    Image.fromarray(np.full((64, 64), 30000, np.uint16)).save(tmp_path / "gray.png")
    repainting = Repainting.load(tmp_path / "gray.png", tmp_path / "mask.png", 64)
    assert repainting.known.mean() == 0.5
    assert repainting.image.mean().item() == pytest.approx(30000 / 32767.5 - 1, abs=0.01)


@pytest.mark.parametrize("checkpoint", ["inpaint", "tiny"])
def test_repainting_keeps_what_is_black_in_the_mask(checkpoint, trained, tmp_path):
    flags = ["--checkpoint", str(trained / checkpoint), "--image", str(trained / "image.png")]
    flags += ["--mask", str(trained / "mask.png"), "--prompt", "a red circle"]
    images = run_sample(*flags, "--out", str(tmp_path / "out.npz"))
    image = np.array(Image.open(trained / "image.png"))
    assert (images[:, :, :32] == image[None, :, :32]).all()
    assert (images[:, :, 32:] != image[None, :, 32:]).mean() > 0.9


def test_the_noise_of_small_pictures_is_not_what_they_began_as(trained, monkeypatch):
    seen = []
    noting = lambda *args: seen.append(noised(*args)) or seen[-1]  # noqa: E731
    monkeypatch.setattr(generate, "noised", noting)
    upsampler = Generator.load(trained / "up", "cpu")
    small = torch.zeros(2, 3, 16, 16)
    upsampler.enlarge(small, ["a", "b"], 499, sample.Config(device="cpu"), steps=1)
    noise = seen[0]["low_res"] / (1 - upsampler.diffusion.alpha_bar[499]).sqrt().float()
    x_T = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert noise.std() == pytest.approx(1, abs=0.1) and abs((noise * x_T).mean()) < 0.1


def test_little_strength_keeps_most_of_the_picture(trained, tmp_path):
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
        (["--checkpoint", "{}/small", "--upsampler", "{}/tiny"], "does not enlarge"),
        (["--checkpoint", "{}/tiny", "--upsampler", "{}/up"], "--checkpoint draws 64x64"),
        (["--checkpoint", "{}/small", "--upsampler", "{}/up", "--noise-level", "500"], "from 0 to 499"),
        (
            ["--checkpoint", "{}/small", "--openai-upsampler", "x", "--vocabulary", "{}"],
            "--openai-upsampler enlarges 64x64 pixels",
        ),
        (["--checkpoint", "{}/tiny", "--mask", "{}/mask.png"], "--mask says which part"),
        (["--checkpoint", "{}/tiny", "--image", "{}/none.png"], "none.png cannot be read as a picture"),
        (["--checkpoint", "{}/tiny", "--image", "{}/image.png", "--strength", "0"], "--strength is 0"),
        (["--checkpoint", "{}/tiny", "--image", "{}/cut.png"], "cut.png cannot be read as a picture"),
        (["--checkpoint", "{}/tiny", "--times", "0"], "--times is 0"),
        (["--checkpoint", "{}/small", "--upsampler", "{}/none"], "--upsampler"),
        (["--checkpoint", "{}/tiny", "--image", "{}/image.png", "--mask", "{}/black.png"], "is black"),
        (["--checkpoint", "{}/tiny", "--image", "{}/large.png"], "could be decompression bomb"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(flags, line, trained, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(sample.main, sample.Config, argv=[flag.format(trained) for flag in flags])
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1


def test_weights_of_another_network_are_refused(trained, tmp_path, capsys):
    flags = ["--preset", "tiny_inpainting", "--start-from", str(trained / "small")]
    with pytest.raises(SystemExit, match="2"):
        run_train(*flags, "--out", str(tmp_path / "x"))
    assert "its network is another" in capsys.readouterr().err and not (tmp_path / "x").exists()
