"""The demo: its function for checkpoints of all lessons, and the page in a browser, if there is one."""

import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from common.cli import run_command
from common.errors import UserError
from common.protocols import Model
from common.training.checkpoints import pretrained_path
from lesson_01_ddpm.diffusion import clamp_x_0
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_06_miniglide import demo, demo_model
from lesson_06_miniglide.demo_model import DemoModel, inpaint_inputs, sample_frames
from lesson_06_miniglide.editing.inpaint_inputs import InpaintInputs
from lesson_06_miniglide.model import build_model, build_network
from lesson_06_miniglide.networks.presets import PRESETS
from lesson_06_miniglide.pipeline import MiniGlidePipeline
from tests.conftest import ROOT

LESSONS = ["lesson_01_ddpm", "lesson_02_improved_ddpm", "lesson_03_adm", "lesson_04_text_conditioning"]
PRETRAINED = [(lesson, None) for lesson in LESSONS]
PRETRAINED += [("lesson_06_miniglide", name) for name in (None, "dogs", "small", "inpainting")]
REQUEST = {"guidance_scale": 3, "steps": 2, "sampler": "dpm++", "thresholding": False, "seed": 0, "n": 2}


@pytest.fixture(scope="module")
def model():
    return DemoModel(None, "cpu")


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """Checkpoints of lesson 6's presets with random weights: name -> path."""
    tokenizer, folder = CaptionTokenizer.train(["a red circle"], 300, 24), tmp_path_factory.mktemp("weights")
    for name in ("tiny_inpainting", "tiny_upsampler"):
        torch.manual_seed(0)
        network, process, metadata = build_model(name, text_config=PRESETS[name].text)
        metadata = dict(metadata) | {"prompts": ["a red circle"], "tokenizer": tokenizer.to_json()}
        model = Model(network, process, metadata | {"config": {"preset": name, "timesteps": 1000}})
        MiniGlidePipeline(model, tokenizer).save_pretrained(folder / f"{name}.safetensors")
    return lambda name: folder / f"{name}.safetensors"


def ask(model, **changed):
    return list(sample_frames(model, **{"prompt": "7"} | REQUEST | changed))


@pytest.mark.parametrize("lesson, name", PRETRAINED)
def test_checkpoints_of_all_lessons_draw(lesson, name):
    frames = ask(DemoModel(pretrained_path(lesson, name), "cpu"))
    assert len(frames) == 3 and frames[-1][0].shape[2] == 3 and frames[-1][0].dtype == np.uint8
    assert (frames[0][0] != frames[-1][0]).any()


def test_samples_depend_on_the_seed_and_on_every_setting(model):
    def last(**changed):
        return ask(model, prompt="a red seven", **changed)[-1][0]

    first = last()
    assert (first == last()).all()
    others = ({"seed": 1}, {"guidance_scale": 7}, {"sampler": "ddpm"}, {"steps": 3})
    for changed in (*others, {"guidance_scale": 20, "thresholding": True}):
        assert (first != last(**changed)).any(), changed


def test_many_steps_are_shown_in_few_frames(model):
    assert len(ask(model, prompt="a red seven", steps=60, n=1)) <= demo_model.FRAMES + 1


@pytest.mark.parametrize("checkpoint", ["lesson_01_ddpm", "lesson_05_cfg", "tiny_inpainting"])
def test_what_is_not_painted_stays(checkpoint, untrained):
    trained_to_inpaint = checkpoint == "tiny_inpainting"
    model = DemoModel(untrained(checkpoint) if trained_to_inpaint else pretrained_path(checkpoint), "cpu")
    background = np.full((64, 64, 3), 255, np.uint8)
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:, 32:, 3] = 255
    drawing = {"background": background, "layers": [layer], "composite": background}
    inputs = inpaint_inputs(drawing, (3, 32, 32))
    assert inputs.keep_mask[0, 0, 0].tolist() == [1] * 16 + [0] * 16 and inputs.image.min() == 1
    sample = ask(model, prompt="a red seven", n=1, drawing=drawing)[-1][0]
    assert (sample[20:-20, 20:200] == 255).all() and (sample[:, 300:] != 255).any()
    thin = np.zeros((64, 64, 4), np.uint8)
    thin[10, :, 3] = 1
    keep_mask = inpaint_inputs({"background": background, "layers": [thin]}, (3, 32, 32)).keep_mask
    assert keep_mask.sum() == 31 * 32
    nothing = {"background": background, "layers": [np.zeros((64, 64, 4), np.uint8)]}
    assert inpaint_inputs(nothing, (3, 32, 32)) is None and inpaint_inputs(None, (3, 32, 32)) is None


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"prompt": ""}, "Enter a prompt"),
        ({"prompt": "a" * 301}, "301 characters"),
        ({"steps": 1}, "between 2 and 250"),
        ({"steps": 1000}, "between 2 and 250"),
        ({"n": 17}, "between 1 and 16"),
        ({"guidance_scale": float("nan")}, "between 0 and 20"),
        ({"seed": -1}, "The seed"),
        ({"seed": None}, "A field is empty"),
        ({"steps": float("inf")}, "A field is empty"),
        ({"sampler": "x"}, "The sampler x is unknown"),
    ],
)
def test_wrong_inputs_are_refused_with_a_message(changed, line, model):
    with pytest.raises(UserError, match=line):
        ask(model, **changed)


def test_lesson_3_needs_a_digit():
    with pytest.raises(UserError, match="0 to 9"):
        ask(DemoModel(pretrained_path("lesson_03_adm"), "cpu"), prompt="a red seven")


def test_an_image_that_is_too_large(model):
    drawing = {"background": np.zeros((4097, 10, 3), np.uint8), "layers": []}
    with pytest.raises(UserError, match="more than 4096 pixels"):
        ask(model, prompt="a red seven", drawing=drawing)


def test_thresholding_also_applies_to_inpainting():
    inputs, preset = (
        InpaintInputs(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)),
        PRESETS["tiny_inpainting"],
    )
    with torch.device("meta"):
        network = build_network(preset, preset.network, preset.text, torch.ones(1))
    for denoised_fn, largest in ((clamp_x_0, 1.0), (lambda x_0: x_0 / 2, 2.0)):
        sampler, _ = inputs.make_sampler(network, lambda denoised_fn: denoised_fn, 1, 5, denoised_fn)
        assert sampler()(torch.full((1, 3, 8, 8), 4.0)).max() == largest


def test_unusable_checkpoints_and_ports_are_refused_in_a_line(untrained, capsys):
    clip_weights = pretrained_path("lesson_06_miniglide", "clip")
    flags = {
        ("--checkpoint", str(clip_weights)): "is not a text-to-image network",
        ("--checkpoint", str(untrained("tiny_upsampler"))): "--checkpoint is an upsampler",
        ("--port", "99999"): "between 1 and 65535",
    }
    for argv, line in flags.items():
        with pytest.raises(SystemExit, match="2"):
            run_command(demo.main, demo.Config, argv=list(argv))
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    assert demo.Config().host == "127.0.0.1"


def test_a_missing_checkpoint_is_refused_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(demo.main, demo.Config, argv=["--checkpoint", str(tmp_path / "x.safetensors")])
    assert "does not exist" in capsys.readouterr().err


@pytest.fixture
def address():
    """The address of demo.py in another process, because gradio does not accept type-checked generators."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "lesson_06_miniglide/demo.py", "--device", "cpu", "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(240):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, "demo.py has ended"
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def test_the_page_in_a_browser(request):
    """Open, enter a prompt, generate, see two images; an empty prompt shows a message."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None) or pytest.skip("there is no chromium")
    address = request.getfixturevalue("address")
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        tab = browser.new_page()
        tab.goto(address)
        prompt, button = tab.get_by_label("Prompt").first, tab.get_by_role("button", name="Generate")
        prompt.fill("a blue three")
        button.click()
        both = "[...document.querySelectorAll('img')].filter(i => i.naturalWidth > 100).length == 2"
        tab.wait_for_function(both, timeout=60_000)
        prompt.fill("")
        message = tab.get_by_text("Enter a prompt.").first
        for _ in range(60):  # a click counts once the first request is done
            button.click()
            tab.wait_for_timeout(1000)
            if message.is_visible():
                break
        assert message.is_visible() and "Traceback" not in tab.content()
        browser.close()
