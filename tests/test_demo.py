"""The page: its function for checkpoints of all lessons, and itself in a browser, where there is one."""

import shutil

import numpy as np
import pytest
import torch

from common.command import UserError, run_command
from common.runs import shipped_weights
from lesson_01_ddpm.diffusion import clip
from lesson_06_miniglide import demo
from lesson_06_miniglide.demo import Model, draw, repainting_of
from lesson_06_miniglide.inpainting import Repainting
from lesson_06_miniglide.presets import PRESETS, new_network

LESSONS = ["lesson_01_ddpm", "lesson_02_improved_ddpm", "lesson_03_adm", "lesson_04_text_conditioning"]
SHIPPED = [(lesson, None) for lesson in LESSONS]
SHIPPED += [("lesson_06_miniglide", name) for name in (None, "dogs", "small", "inpainting")]
ASK = {"guidance_scale": 3, "steps": 2, "sampler": "dpm++", "thresholding": False, "seed": 0, "n": 2}


@pytest.fixture(scope="module")
def model():
    return Model(None, "cpu")


def ask(model, **changed):
    return list(draw(model, **{"prompt": "7"} | ASK | changed))


@pytest.mark.parametrize("lesson, name", SHIPPED)
def test_checkpoints_of_all_lessons_draw(lesson, name):
    pictures = ask(Model(shipped_weights(lesson, name), "cpu"))
    assert len(pictures) == 3 and pictures[-1][0].shape[2] == 3 and pictures[-1][0].dtype == np.uint8
    assert (pictures[0][0] != pictures[-1][0]).any()


def test_the_same_seed_gives_the_same_samples_and_settings_count(model):
    def last(**changed):
        return ask(model, prompt="a red seven", **changed)[-1][0]

    first = last()
    assert (first == last()).all()
    others = ({"seed": 1}, {"guidance_scale": 7}, {"sampler": "ddpm"}, {"steps": 3})
    for changed in (*others, {"guidance_scale": 20, "thresholding": True}):
        assert (first != last(**changed)).any(), changed


def test_many_steps_are_shown_in_few_frames(model):
    assert len(ask(model, prompt="a red seven", steps=60, n=1)) <= demo.FRAMES + 1


@pytest.mark.parametrize("lesson, name", [("lesson_05_cfg", None), ("lesson_06_miniglide", "inpainting")])
def test_what_is_not_painted_stays(lesson, name):
    model = Model(shipped_weights(lesson, name), "cpu")
    background = np.full((64, 64, 3), 255, np.uint8)
    layer = np.zeros((64, 64, 4), np.uint8)
    layer[:, 32:, 3] = 255
    drawing = {"background": background, "layers": [layer], "composite": background}
    repainting = repainting_of(drawing, (3, 32, 32))
    assert repainting.known[0, 0, 0].tolist() == [1] * 16 + [0] * 16 and repainting.image.min() == 1
    sample = ask(model, prompt="a red seven", n=1, drawing=drawing)[-1][0]
    assert (sample[20:-20, 20:200] == 255).all() and (sample[:, 300:] != 255).any()
    thin = np.zeros((64, 64, 4), np.uint8)
    thin[10, :, 3] = 1
    assert repainting_of({"background": background, "layers": [thin]}, (3, 32, 32)).known.sum() == 31 * 32
    nothing = {"background": background, "layers": [np.zeros((64, 64, 4), np.uint8)]}
    assert repainting_of(nothing, (3, 32, 32)) is None and repainting_of(None, (3, 32, 32)) is None


@pytest.mark.parametrize(
    "changed, line",
    [
        ({"prompt": ""}, "Write what to draw"),
        ({"prompt": "a" * 301}, "301 letters"),
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
def test_what_is_wrong_is_said(changed, line, model):
    with pytest.raises(UserError, match=line):
        ask(model, **changed)


def test_lesson_3_wants_a_digit():
    with pytest.raises(UserError, match="0 to 9"):
        ask(Model(shipped_weights("lesson_03_adm"), "cpu"), prompt="a red seven")


def test_a_picture_that_is_too_large(model):
    drawing = {"background": np.zeros((4097, 10, 3), np.uint8), "layers": []}
    with pytest.raises(UserError, match="larger than 4096 pixels"):
        ask(model, prompt="a red seven", drawing=drawing)


def test_thresholding_counts_where_a_picture_is_repainted():
    repainting = Repainting(torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8))
    with torch.device("meta"):
        network = new_network("tiny_inpainting", *PRESETS["tiny_inpainting"][:2], torch.ones(1))
    for bound, largest in ((clip, 1.0), (lambda x_0: x_0 / 2, 2.0)):
        sampler, _ = repainting.drawn_by(network, lambda bound: bound, 1, 5, bound)
        assert sampler()(torch.full((1, 3, 8, 8), 4.0)).max() == largest


def test_what_is_no_drawing_network_and_no_port_are_said_in_a_line(capsys):
    clip_weights = shipped_weights("lesson_06_miniglide", "clip")
    flags = {("--checkpoint", str(clip_weights)): "does not draw", ("--port", "99999"): "between 1 and 65535"}
    for argv, line in flags.items():
        with pytest.raises(SystemExit, match="2"):
            run_command(demo.main, demo.Config, argv=list(argv))
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1
    assert demo.Config().host == "127.0.0.1"


def test_a_checkpoint_that_is_none_is_said_in_a_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run_command(demo.main, demo.Config, argv=["--checkpoint", str(tmp_path / "x.safetensors")])
    assert "is not there" in capsys.readouterr().err


def test_the_page_in_a_browser(model):
    """Open, type a prompt, draw, see a picture; a prompt that is none shows a message."""
    pytest.importorskip("gradio", reason="gradio is not installed")
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None) or pytest.skip("there is no chromium")
    blocks = demo.page(model)
    _, address, _ = blocks.launch(server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    try:
        with sync.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            tab = browser.new_page()
            tab.goto(address)
            prompt, button = tab.get_by_label("Prompt").first, tab.get_by_role("button", name="Draw")
            prompt.fill("a blue three")
            button.click()
            both = "[...document.querySelectorAll('img')].filter(i => i.naturalWidth > 100).length == 2"
            tab.wait_for_function(both, timeout=60_000)
            prompt.fill("")
            message = tab.get_by_text("Write what to draw.").first
            for _ in range(60):  # a click counts once the first drawing is done
                button.click()
                tab.wait_for_timeout(1000)
                if message.is_visible():
                    break
            assert message.is_visible() and "Traceback" not in tab.content()
            browser.close()
    finally:
        blocks.close()
