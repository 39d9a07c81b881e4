"""The explorer: its ONNX model, its JavaScript, and the page as a visitor uses it."""

import json
import random
import re
import shutil
import subprocess
import sys
import threading
from functools import partial

import numpy as np
import pytest
import torch

from common.cli import run_command
from common.digits.captions import CAPTIONS, COLOURS, HELD_OUT, WORDS
from common.digits.classifier import load_digit_classifier
from common.digits.evaluation import max_channel, read_colours
from common.errors import UserError
from common.images import to_tensor, to_uint8
from common.protocols import NoiseStreams
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.studies.attention_maps import record_attention
from lesson_05_cfg import export_onnx
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.explorer import serve
from lesson_05_cfg.pipeline import TextToImagePipeline
from tests.conftest import ROOT

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
FLAGS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
STRANGE = "aäéñßçøåœğışİΣςЖжאلไ漢字かな한ǅﬁ²½٣𝟘🙂🌈👩e\u0301\u200d\ufe0f'’.,!?-_0123456789"
STRANGE += " \t\n\u00a0\u0085\u2003\u3000\ufeff\u200b\u180e"
# Ten digits, seven colours, all phrasings; "a green zero" and "a red four" are held-out pairs.
PROMPTS = [
    "a green zero", "the digit one in white", "a purple 2", "the digit 3 in red", "a red four",
    "a blue five", "an orange six", "the digit seven in yellow", "an 8", "the digit 9 in blue",
]  # fmt: skip


@pytest.fixture(scope="module")
def pipe():
    return TextToImagePipeline.from_pretrained(device="cpu")


@pytest.fixture(scope="module")
def dist(tmp_path_factory):
    """The folder of the page; until something needs a browser it holds the model alone."""
    for library in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(library, reason=f"{library} is not installed")
    folder = tmp_path_factory.mktemp("explorer")
    run_script("export_onnx.py", "--out", folder / "model")  # not here: torch cannot trace type checks
    return folder


def run_script(name, *flags):
    command = [sys.executable, ROOT / "lesson_05_cfg" / name, *flags]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if "npm cannot install" in result.stderr:
        pytest.skip(result.stderr.strip())
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def node():
    """Run JavaScript in the folder of the page's sources, and return what it prints as JSON."""
    program = shutil.which("node") or pytest.skip("there is no node")

    def run(code, data):
        read = "import { readFileSync } from 'node:fs'; const data = JSON.parse(readFileSync(0, 'utf8'));"
        command = [program, "--input-type=module", "-e", read + code]
        options = {"cwd": serve.SOURCE, "capture_output": True, "text": True, "encoding": "utf-8"}
        result = subprocess.run(command, input=json.dumps(data), **options)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)

    return run


# -- the export ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 5])
def test_onnx_gives_the_outputs_of_pytorch(n, dist, pipe):
    ort = pytest.importorskip("onnxruntime")
    text_encoder, unet = (
        ort.InferenceSession(dist / "model" / name) for name in ("text_encoder.onnx", "unet.onnx")
    )
    prompts = ["the digit 7 in orange", "", "a zebra", "an 8", "a red seven in red in red in"][:n]
    tokens, mask = pipe.tokenizer.encode(prompts)
    text = pipe.network.encode_text(tokens, mask)
    torch.manual_seed(0)
    x_t, t = torch.randn(n, 3, 32, 32), torch.tensor([999, 0, 1, 500, 998])[:n]
    with record_attention(pipe.network) as maps:
        output = pipe.network(x_t, t, text=text)
    encoded = text_encoder.run(None, {"tokens": tokens.numpy(), "mask": mask.numpy()})
    inputs = {"x_t": x_t.numpy(), "t": t.numpy(), "pooled": encoded[0], "token_states": encoded[1]}
    expected = (*text, output[:, :3], output[:, 3:], maps[0])
    for name, ours, theirs in zip("tsxva", (*encoded, *unet.run(None, inputs)), expected):
        torch.testing.assert_close(torch.from_numpy(ours), theirs, atol=1e-3, rtol=0, msg=name)


@pytest.mark.slow
def test_the_export_is_small_and_says_nothing_about_this_machine(dist):
    files = [dist / "model" / name for name in export_onnx.MODEL_FILES]
    assert sum(file.stat().st_size for file in files) < 6_000_000
    assert not [file for file in files if str(ROOT).encode() in file.read_bytes()]
    constants = json.loads(files[-1].read_text())
    assert constants["alpha_bar"] == make_diffusion().alpha_bar.tolist()
    assert constants["longest_caption"] == 5 and " seven" in [
        p.replace("Ġ", " ") for p in constants["pieces"]
    ]


def test_missing_tools_are_named_in_a_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setattr(serve.shutil, "which", lambda name: None)
    lines = {export_onnx: "pip install onnx onnxscript", serve: "install Node.js"}
    for module, line in lines.items():
        with pytest.raises(SystemExit, match="2"):
            run_command(module.main, module.Config, argv=["--out", str(tmp_path)])
        error = capsys.readouterr().err
        assert line in error and error.count("\n") == 1


def test_links_lead_to_sections_of_the_lessons():
    source = (serve.SOURCE / "index.html").read_text(encoding="utf-8")
    values = {"repository": serve.repository_url(), "bytes": "1"}
    links = re.findall('href="(https[^"]+)"', serve.fill_in(source, values, serve.notebook_link))
    assert len(links) >= 11 and all(link.startswith(values["repository"]) for link in links)
    with pytest.raises(UserError, match="a section that"):
        serve.fill_in("{{lesson_05_cfg/cfg.ipynb#Nothing}}", values, serve.notebook_link)
    section = ("lesson_05_cfg/cfg.ipynb", "4. How much guidance?")
    assert serve.notebook_link(*section).endswith("/blob/main/lesson_05_cfg/cfg.ipynb#4.-How-much-guidance?")
    assert serve.page_link("..", *section) == "../lesson_05_cfg/cfg.html#how-much-guidance"


# -- the JavaScript without a browser ------------------------------------------------------------------------


def test_the_tokenizer_gives_the_ids_of_the_library(node, pipe):
    chance = random.Random(0)
    strange = ["".join(chance.choices(STRANGE, k=chance.randrange(30))) for _ in range(900)]
    mixed = [" ".join(chance.choices([*CAPTIONS[:20], "Réd", "🙂", "don't", "  "], k=3)) for _ in range(100)]
    captions = [
        *CAPTIONS,
        *strange,
        *mixed,
        "",
        "<|endoftext|>",
        "a <|endoftext|>red",
        "A RED SEVEN",
        "x" * 900,
    ]
    code = """
        const { CaptionTokenizer } = await import("./tokenizer.js");
        const tokenizer = new CaptionTokenizer(JSON.parse(data.json), data.options);
        const encode = (caption) => {
          const { tokens, mask } = tokenizer.encode(caption);
          return [tokenizer.tokenIds(caption), [...tokens].map(Number), [...mask]];
        };
        console.log(JSON.stringify(data.captions.map(encode)));"""
    tokenizer = pipe.tokenizer
    options = {"contextLength": tokenizer.context_length, "paddingId": tokenizer.padding_id}
    ours = node(code, {"json": tokenizer.to_json(), "options": options, "captions": captions})
    tokens, mask = tokenizer.encode(captions)
    for caption, (ids, padded, is_token), expected, expected_mask in zip(captions, ours, tokens, mask):
        assert ids == tokenizer.token_ids(caption), repr(caption)
        assert padded == expected.tolist() and is_token == expected_mask.int().tolist()


TOY_PROCESS = GaussianDiffusion(linear_betas(100))


def toy_denoiser(x_t, t):
    """eps_hat and v of a function that is as easily written in JavaScript: x_0 = sin(2 x_t) + 0.3."""
    alpha_bar = TOY_PROCESS.alpha_bar[t[0]].item()
    eps_hat = (x_t - alpha_bar**0.5 * ((2 * x_t).sin() + 0.3)) / (1 - alpha_bar) ** 0.5
    return torch.cat([eps_hat, (3 * x_t).sin()], 1)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_take_the_steps_of_the_lessons(name, node):
    code = """
        const { GaussianDiffusion, SAMPLERS } = await import("./sampling.js");
        const process_ = new GaussianDiffusion(data.alpha_bar).respaceEvenly(data.steps);
        const denoiser = async (x_t, t) => {
          const [alpha, sigma] = [Math.sqrt(data.alpha_bar[t]), Math.sqrt(1 - data.alpha_bar[t])];
          const eps_hat = x_t.map((x) => (x - alpha * (Math.sin(2 * x) + 0.3)) / sigma);
          return { eps_hat, v: x_t.map((x) => Math.sin(3 * x)) };
        };
        const noise = data.noise.values();
        const steps = [];
        for await (const { i, t, x_t, x_0, x_prev } of
            SAMPLERS[data.name](process_, denoiser, Float32Array.from(data.x_T), () => noise.next().value))
          steps.push([i, t, [...x_t], [...x_0], [...x_prev]]);
        console.log(JSON.stringify(steps));"""
    process, num_steps = TOY_PROCESS, 7
    x_T = torch.randn(1, 3, 2, 2, generator=torch.Generator().manual_seed(1))
    draws = NoiseStreams(0, [0])
    noise = [draws.randn(x_T.shape).flatten().tolist() for _ in range(num_steps - 1)]
    data = {"alpha_bar": process.alpha_bar.tolist(), "steps": num_steps, "name": name, "noise": noise}
    ours = node(code, data | {"x_T": x_T.flatten().tolist()})
    respaced = process.respace_evenly(num_steps)
    theirs = list(SAMPLERS[name](respaced, toy_denoiser, x_T, NoiseStreams(0, [0])))
    assert len(ours) == len(theirs) == num_steps
    for (i, t, *images), step in zip(ours, theirs):
        assert i == step.t and t == respaced.timesteps[i]
        for image, expected in zip(images, step[1:]):
            torch.testing.assert_close(torch.tensor(image).float(), expected.flatten(), atol=1e-4, rtol=0)


def test_respacing_guidance_and_noise(node):
    code = """
        const { GaussianDiffusion, guide, noiseSource } = await import("./sampling.js");
        const process_ = new GaussianDiffusion(data);
        const timesteps = Array.from({ length: 200 }, (_, n) => process_.respaceEvenly(n + 1).timesteps);
        const [cond, uncond] = [{ eps_hat: [3], v: [5] }, { eps_hat: [1], v: [7] }];
        const guided = [0, 1, 2.5].map((scale) => guide(cond, uncond, scale));
        const noise = [0, 0, 1].map((seed) => [...noiseSource(seed)(20000)]);
        console.log(JSON.stringify({ timesteps, guided, noise }));"""
    process = make_diffusion()
    ours = node(code, process.alpha_bar.tolist())
    for n, timesteps in enumerate(ours["timesteps"], 1):
        assert timesteps == process.respace_evenly(n).timesteps.tolist()
    assert ours["guided"] == [{"eps_hat": [e], "v": [v]} for e, v in ((1, 7), (3, 5), (6, 5))]
    same, again, other = np.array(ours["noise"])
    assert (same == again).all() and abs(np.corrcoef(same, other)[0, 1]) < 0.03
    for moment, expected in ((1, 0), (2, 1), (3, 0), (4, 3)):
        assert (same**moment).mean() == pytest.approx(expected, abs=0.2)


# -- the page in a browser -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser(dist):
    sync = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, map(shutil.which, names)), None) or pytest.skip("there is no chromium")
    if not shutil.which("npm"):
        pytest.skip("there is no npm")
    run_script("explorer/serve.py", "--no-serve", "--out", dist)
    with sync.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        yield browser
        browser.close()


class Page:
    """The page in a tab, as a visitor sees it; it remembers what went wrong."""

    def __init__(self, browser, address, **options):
        self.errors = []
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(300_000)
        self.tab = self.context.new_page()
        self.tab.on("console", lambda m: self.errors.append(m.text) if m.type == "error" else None)
        self.tab.on("pageerror", lambda error: self.errors.append(str(error)))
        self.tab.on("requestfailed", lambda request: self.errors.append(request.url))
        self.tab.goto(address)
        self.wait()

    def wait(self, text="finished"):
        """Wait until the network has finished (text "Both": for both scales)."""
        self.tab.wait_for_function(f"document.getElementById('announcement').textContent.includes('{text}')")

    def set(self, name, value):
        """Move a slider or choose an option."""
        self.tab.locator(f"#{name}").evaluate("(element, value) => (element.value = value)", str(value))
        for event in ("input", "change"):
            self.tab.locator(f"#{name}").dispatch_event(event)

    def ask(self, caption):
        self.tab.get_by_label("Caption", exact=True).fill(caption)
        self.tab.keyboard.press("Enter")
        self.wait()

    def canvas(self, name):
        """The pixels of a canvas, uint8 [H, W, 3]."""
        code = "c => [c.height, c.width, [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]]"
        height, width, values = self.tab.locator(name).evaluate(code)
        return np.array(values, np.uint8).reshape(height, width, 4)[..., :3]

    def text(self, name):
        return self.tab.locator(f"#{name}").inner_text()


@pytest.fixture(scope="module")
def server(dist):
    with serve.make_server(dist, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def address(server):
    return f"http://127.0.0.1:{server.server_port}/"


@pytest.fixture(scope="module")
def page(browser, server):
    page = Page(browser, address(server))
    yield page
    page.context.close()


@pytest.fixture(autouse=True)
def no_errors(request):
    """No test leaves an error in the console of the shared page."""
    yield
    if "page" in request.fixturenames:
        assert not request.getfixturevalue("page").errors


@pytest.mark.slow
@pytest.mark.parametrize("name, scale", [("dpm++", 3), ("ddim", 1), ("ddpm", 0)])
def test_the_same_noise_gives_the_image_of_the_pipeline(name, scale, page, pipe):
    code = """async ({ name, scale, x_T, noise, caption }) => {
        const { TextToImageNetwork } = await import("./network.js");
        const { GaussianDiffusion, guide, SAMPLERS } = await import("./sampling.js");
        const network = (window.testNetwork ??= await TextToImageNetwork.load());
        const text = await network.encode(caption);
        const denoiser = async (x_t, t) => {
          const { cond, uncond } = await network.predict(x_t, t, text);
          return guide(cond, uncond, scale);
        };
        const process = new GaussianDiffusion(network.constants.alpha_bar).respaceEvenly(20);
        const draws = noise.values();
        const steps = SAMPLERS[name](process, denoiser, Float32Array.from(x_T), () => draws.next().value);
        let last;
        for await (const step of steps) last = step.x_prev;
        return [...last];
      }"""
    caption, x_T = "a blue three", torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    sampler, denoiser = pipe.bind_sampler(name, 20), pipe.make_denoiser([caption], scale)(torch.tensor([0]))
    *_, last = sampler(denoiser, x_T, NoiseStreams(0, [0]))
    draws = NoiseStreams(0, [0])
    noise = [draws.randn(x_T.shape).flatten().tolist() for _ in range(19)] if name == "ddpm" else []
    data = {"name": name, "scale": scale, "caption": caption, "x_T": x_T.flatten().tolist(), "noise": noise}
    ours = torch.tensor(page.tab.evaluate(code, data)).view(1, 3, 32, 32)
    difference = (to_uint8(ours).int() - to_uint8(last.x_prev).int()).abs()
    assert difference.max() <= 2


@pytest.mark.slow
def test_ten_captions_give_their_digits_and_colours(page):
    images = []
    for prompt in PROMPTS:
        page.ask(prompt)
        assert page.text("time-value").startswith("Finished: 20 steps")
        images.append(page.canvas("#x_0"))
        assert (images[-1] == page.canvas("#x_t")).all()  # both show the finished image
    samples = to_tensor(np.stack(images))
    digits = load_digit_classifier().predict(max_channel(samples))[1].argmax(-1).tolist()
    colours = [COLOURS[i] if i >= 0 else "none" for i in read_colours(samples).tolist()]
    names = zip(PROMPTS, digits, colours)
    right = [(WORDS[d] in p or str(d) in p) and (c in p or p == "an 8") for p, d, c in names]
    assert sum(right) >= 9, [*zip(PROMPTS, digits, colours)]


@pytest.mark.slow
def test_time_can_be_turned_back(page):
    page.ask("a white one")
    time, finished = page.tab.get_by_label("Step", exact=True), page.canvas("#x_t")
    time.focus()
    page.tab.keyboard.press("Home")
    assert page.text("time-value") == "Step 1 of 20, t = 999" and time.get_attribute("aria-valuetext")
    noise, prediction = page.canvas("#x_t"), page.canvas("#x_0")
    assert noise.std() > 80 and (noise != finished).mean() > 0.5 and (prediction != noise).mean() > 0.5
    page.tab.keyboard.press("ArrowRight")
    assert page.text("time-value").startswith("Step 2 of 20, t = 9")
    page.tab.locator("#strip canvas").last.click()
    assert page.text("time-value").startswith("Finished") and (page.canvas("#x_t") == finished).all()
    page.tab.evaluate("""() => {
        window.seen = [];
        const label = document.getElementById("time-value");
        const remember = () => window.seen.push(label.textContent.split(" ")[1]);
        new MutationObserver(remember).observe(label, { childList: true });
      }""")
    page.tab.get_by_role("button", name="Play the steps").click()
    page.tab.wait_for_function("window.seen.length > 20")
    page.tab.get_by_role("button", name="Play the steps").wait_for()
    assert page.tab.evaluate("window.seen") == [*map(str, range(1, 21)), "20"]  # "Finished: 20 steps"


@pytest.mark.slow
def test_two_scales_from_the_same_noise(page):
    page.set("steps", 5)
    page.set("other-scale", 12)
    page.wait("Both")
    first, second = page.canvas("#compare-first"), page.canvas("#compare-second")
    assert (first == page.canvas("#x_0")).all() and (first != second).mean() > 0.05
    assert page.text("first-scale") == "3" and page.text("second-scale") == "12"
    page.set("other-scale", 3)
    page.wait("Both")
    assert (page.canvas("#compare-second") == first).all()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_guidance_is_the_formula(sampler, page):
    page.set("steps", 4)
    page.set("sampler", sampler)
    for scale, branch in ((0, "#without"), (1, "#with")):
        page.set("scale", scale)
        page.wait()
        for position in (0, 2):
            page.set("time", position)
            assert (page.canvas("#guided") == page.canvas(branch)).all()
        assert np.ptp(page.canvas("#difference")) > 0
    page.set("scale", 3)
    page.set("sampler", "dpm++")
    page.wait()


@pytest.mark.slow
def test_each_token_has_an_attention_map(page):
    page.ask("the digit 7 in orange")
    page.set("time", 1)
    labels = page.tab.locator("#attention figcaption").all_inner_texts()
    assert [label.split("”")[0] for label in labels] == ["“the", "“digit", "“7", "“in", "“orange"]
    for i in range(5):
        heat = page.canvas(f"#attention figure:nth-child({i + 1}) canvas")
        assert heat.shape == (8, 8, 3) and np.ptp(heat) > 0
    page.ask("an 8")
    assert page.tab.locator("#attention canvas").count() == 2


@pytest.mark.slow
def test_notes_on_captions(page):
    page.set("steps", 2)
    for caption, note in {
        "a red zebra": "No training caption has “zebra”",
        "red seven": "No training caption has “red”",
        "": "The empty caption",
        "a red seven in red in red in red in red": "after the first 8 tokens: “a red seven in red in red in”",
        "a red seven in red in": "This caption has 6 tokens",
        "a green 0": "No training image was a green zero",
        "a\ud83d seven 🙂": "No training caption has",
        "word " * 50_000: "is too long",
    }.items():
        page.ask(caption)
        assert note in page.text("notes"), caption
        assert page.canvas("#x_0").std() > 0 and page.text("time-value").startswith("Finished")
    page.ask("a red seven")
    assert not page.text("notes")
    pairs = [f"a {colour} {digit}" for digit, colour in enumerate(HELD_OUT)]
    assert all("No training image" in note for note in map(partial(ask_notes, page), pairs))
    page.set("steps", 20)
    page.wait()


def ask_notes(page, caption):
    page.tab.get_by_label("Caption", exact=True).fill(caption)
    return page.text("notes")


@pytest.mark.slow
def test_everything_has_a_name_and_fits_on_a_phone(browser, server):
    phone = Page(browser, address(server), viewport={"width": 390, "height": 844}, color_scheme="dark")
    named = """() => [...document.querySelectorAll('input, select, button, canvas[role], progress')]
        .filter((e) => !(e.labels?.length || e.ariaLabel || e.textContent.trim())).map((e) => e.id)"""
    assert phone.tab.evaluate(named) == []
    assert phone.tab.evaluate("document.documentElement.scrollWidth") <= 390
    background = phone.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, re.findall(r"\d+", background))) < 60
    focused = set()
    for _ in range(40):  # with the keyboard alone
        phone.tab.keyboard.press("Tab")
        focused.add(phone.tab.evaluate("document.activeElement.id"))
    assert {
        "caption",
        "generate",
        "scale",
        "steps",
        "sampler",
        "seed",
        "new-seed",
        "other-scale",
        "time",
    } <= focused
    phone.tab.get_by_role("button", name="a yellow eight").click()
    phone.wait()
    assert phone.tab.get_by_label("Caption", exact=True).input_value() == "a yellow eight"
    assert not phone.errors
    phone.context.close()


@pytest.mark.slow
def test_reload_works_offline(browser, dist):
    with serve.make_server(dist, 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = Page(browser, address(server))
        page.tab.evaluate("navigator.serviceWorker.ready.then(() => true)")
        server.shutdown()
    page.tab.reload()
    page.wait()
    assert page.canvas("#x_0").std() > 0 and not page.errors
    page.context.close()
