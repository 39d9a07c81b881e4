"""The published GLIDE in our code: its files, its sampling settings, and messages for other files."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import ByteLevelBPETokenizer

from common.cli import run_command
from common.protocols import Model
from common.training.checkpoints import pretrained_path
from lesson_01_ddpm import diffusion
from lesson_01_ddpm.diffusion import linear_betas
from lesson_02_improved_ddpm import ddim
from lesson_02_improved_ddpm.schedules import cosine_betas, space_timesteps
from lesson_03_adm.openai_checkpoints import config_from_openai
from lesson_04_text_conditioning.openai_checkpoints import glide_from_openai
from lesson_04_text_conditioning.text_transformer import TextConfig, TextEncoding
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.tokenizer import END
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_06_miniglide import sample
from lesson_06_miniglide.editing.inpaint_inputs import InpaintInputs
from lesson_06_miniglide.image_data.tokenizers import gpt2_tokenizer
from lesson_06_miniglide.model import build_network
from lesson_06_miniglide.networks.openai_glide import (
    BASE,
    UPSAMPLER,
    UPSAMPLER_SEED,
    BaseProcess,
    super_resolve,
    upsampler_process,
)
from lesson_06_miniglide.networks.presets import GLIDE, GLIDE_TEXT, PRESETS
from tests.test_golden import golden_json, published_weights

DOGS = str(pretrained_path("lesson_06_miniglide", "dogs"))
GOLDEN = ("glide_base", "glide_upsampler", "glide_inpaint")

TEXT = {"blocks.": "transformer.resblocks.", ".qkv.": ".attn.c_qkv.", ".proj.": ".attn.c_proj."}
TEXT |= {".fc_1.": ".mlp.c_fc.", ".fc_2.": ".mlp.c_proj."}
UNET = {"time_mlp.": "time_embed.", "middle.": "middle_block.", "up.": "output_blocks.", "conv_out.": "out."}
UNET |= {"norm_1.": "in_layers.0.", "conv_1.": "in_layers.2.", ".emb.": ".emb_layers.1."}
UNET |= {"norm_2.": "out_layers.0.", "conv_2.": "out_layers.3.", ".skip.": ".skip_connection."}
UNET |= {".proj.": ".proj_out.", ".text_kv.": ".encoder_kv.", "conv_in.": "input_blocks.0.0."}


def published_name(name):
    """Return the name of one of our parameters in OpenAI's code."""
    part, name = name.split(".", 1)
    if name.startswith("proj."):
        return f"transformer_{name}"
    name = re.sub(r"^down\.(\d+)\.", lambda found: f"input_blocks.{int(found[1]) + 1}.", name)
    for ours, theirs in (TEXT if part == "text_encoder" else UNET).items():
        name = name.replace(ours, theirs)
    return name


def golden_network(name):
    settings = golden_json(name)
    return glide_from_openai(settings["config"], published_weights(settings["parameters"]))


@pytest.fixture
def vocabulary(tmp_path):
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["a red corgi"], vocab_size=280, special_tokens=[END])
    tokenizer.save_model(str(tmp_path))
    (tmp_path / "vocab.json").rename(tmp_path / "encoder.json")
    (tmp_path / "merges.txt").rename(tmp_path / "vocab.bpe")
    return tmp_path


@pytest.mark.parametrize("name", GOLDEN)
def test_names_of_the_published_layout(name):
    ours = golden_network(name).state_dict()
    assert {published_name(n): list(w.shape) for n, w in ours.items()} == golden_json(name)["parameters"]


def test_a_full_size_checkpoint_loads_and_draws(vocabulary, tmp_path):
    with torch.device("meta"):
        shapes = {n: w.shape for n, w in full_size().items()}
    assert sum(shape.numel() for shape in shapes.values()) == 385_030_726
    torch.manual_seed(0)
    noise = torch.randn(max(shape.numel() for shape in shapes.values())).half()
    weights = {n: 0.02 * noise[: shape.numel()].reshape(shape) for n, shape in shapes.items()}
    torch.save(weights, tmp_path / "base.pt")
    del weights
    out = tmp_path / "out.npz"
    flags = [
        "--openai",
        str(tmp_path / "base.pt"),
        "--vocabulary",
        str(vocabulary),
        "--prompt",
        "a red corgi",
    ]
    flags += ["--steps", "2", "--num-samples", "1", "--device", "cpu", "--out", str(out)]
    run_command(sample.main, sample.Config, argv=flags)
    images = np.load(out)["images"]
    assert images.shape == (1, 64, 64, 3) and images.std() > 1


def full_size():
    """Every parameter of the published base network, under its published name."""
    network = build_network(PRESETS["glide"], GLIDE, GLIDE_TEXT, torch.ones(1))
    return {published_name(n): w for n, w in network.state_dict().items()}


def test_the_full_size_settings_are_those_of_the_glide_preset():
    assert {**config_from_openai(BASE).__dict__, "out_channels": 6} == GLIDE.__dict__


class Recorder(torch.nn.Module):
    """Stands in for an upsampler and records its calls."""

    image_shape = (3, 8, 8)

    def __init__(self):
        super().__init__()
        self.weight, self.calls = torch.nn.Parameter(torch.zeros(1)), []

    def encode_text(self, tokens, mask):
        return TextEncoding(mask.float(), mask.float()[:, None])

    def forward(self, x_t, t, text, low_res):
        self.calls.append((x_t, t, text, low_res))
        return torch.zeros(len(x_t), 6, *x_t.shape[2:])


def upsampler_pipeline(network, vocabulary):
    return TextToImagePipeline(Model(network, upsampler_process(), {}), gpt2_tokenizer(vocabulary, 8))


def test_the_upsampler_gets_the_inputs_of_the_published_code(vocabulary):
    network = Recorder()
    low_res = torch.rand(2, 3, 4, 4) * 2 - 1
    super_resolve(upsampler_pipeline(network, vocabulary), low_res, ["a", ""])
    x_T, _, text, seen = network.calls[0]
    assert [int(call[1][0]) for call in network.calls] == space_timesteps(1000, "fast27")[::-1]
    torch.testing.assert_close(
        x_T / 0.997, torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(UPSAMPLER_SEED))
    )  # not the noise that low_res started from
    grid = (seen + 1) * 127.5
    torch.testing.assert_close(grid, grid.round(), rtol=0, atol=1e-4)
    assert (seen - low_res).abs().max() <= 1 / 255 + 1e-6
    assert text.pooled.tolist() == [[1] + [0] * 7, [0] * 8]  # each its own caption, without guidance


class Gray(Recorder):
    """Predicts x_0 = 0, a gray image; its eps_hat is right only for the correct schedule."""

    def forward(self, x_t, t, text, low_res, inpaint_image=None, inpaint_mask=None):
        alpha_bar = (1 - linear_betas(1000)).cumprod(0)[t].float().view(-1, 1, 1, 1)
        return torch.cat([x_t / (1 - alpha_bar).sqrt(), torch.zeros_like(x_t)], 1)


def test_the_upsampler_has_its_own_schedule_and_adds_noise_only_to_inpaint(vocabulary, monkeypatch):
    pipe, low_res, drawn = upsampler_pipeline(Gray(), vocabulary), torch.zeros(1, 3, 4, 4), []
    for module in (diffusion, ddim):
        monkeypatch.setattr(module, "gaussian_noise", lambda x, g: drawn.append(1) or torch.zeros_like(x))
    assert super_resolve(pipe, low_res, ["a"]).abs().max() < 1e-4 and not drawn
    keep_mask = torch.zeros(1, 1, 8, 8)
    keep_mask[..., :4] = 1
    inputs = InpaintInputs(torch.full((1, 3, 8, 8), 0.5), keep_mask)
    images = super_resolve(pipe, low_res, ["a"], inpaint=inputs)
    assert len(drawn) == 26 and (images[..., :4] == 0.5).all() and images[..., 4:].abs().max() < 1e-4


def test_default_settings():
    def settings(**flags):
        config = sample.with_defaults(sample.Config(**flags))
        return config.steps, config.sampler, config.guidance_scale

    assert settings(openai="x") == (100, "ddpm", 3.0)
    assert settings(openai="x", mask="y") == (100, "ddpm", 5.0)
    assert settings() == (20, "dpm++", 3.0)


def test_the_base_network_has_100_timesteps_of_the_cosine_schedule():
    process = BaseProcess().respace_evenly(100)
    assert process.timesteps.tolist() == space_timesteps(1000, "100")
    alpha_bar = (1 - cosine_betas(1000)).cumprod(0)[process.timesteps]
    torch.testing.assert_close(process.alpha_bar, alpha_bar)


@pytest.fixture
def published(vocabulary, monkeypatch):
    """A folder with the four files, of small networks, the vocabulary, and an image to inpaint."""
    small = {"num_channels": 32, "num_res_blocks": 1, "channel_mult": "1,1", "num_head_channels": 16}
    small |= {"attention_resolutions": "16", "text_ctx": 8, "xf_width": 32, "xf_layers": 1, "xf_heads": 2}
    torch.manual_seed(0)
    for settings, name, size in ((BASE, "base", 64), (UPSAMPLER, "upsample", 128)):
        for key, value in (small | {"image_size": size}).items():
            monkeypatch.setitem(settings, key, value)
        config, text = (
            replace(config_from_openai(settings), out_channels=6),
            TextConfig(50_257, 8, 32, 1, 2),
        )
        for inpaint, ending in ((False, ""), (True, "_inpaint")):
            network = TextUNet(config, text, inpaint, settings.get("super_res", False))
            weights = {published_name(n): 0.2 * torch.randn_like(w) for n, w in network.state_dict().items()}
            torch.save(weights, vocabulary / f"{name}{ending}.pt")
    rng, mask = np.random.default_rng(0), np.zeros((64, 64), np.uint8)
    mask[:, 32:] = 255
    Image.fromarray(rng.integers(0, 256, (128, 128, 3), np.uint8)).save(vocabulary / "image.png")
    Image.fromarray(mask).save(vocabulary / "mask.png")
    return vocabulary


def drawn(folder, *flags):
    """Return the sample that sample.py draws for one prompt; file names are relative to the folder."""
    files = [str(folder / flag) if (folder / flag).is_file() else flag for flag in flags]
    files += ["--vocabulary", str(folder)] if any("openai" in flag for flag in flags) else []
    files += ["--prompt", "a corgi", "--num-samples", "1", "--steps", "2"]
    out = folder / "out.npz"
    run_command(sample.main, sample.Config, argv=[*files, "--device", "cpu", "--out", str(out)])
    return np.load(out)["images"][0]


def test_the_upsampler_enlarges_samples_of_the_base_network(published, monkeypatch):
    calls, forward = [], TextUNet.forward

    def recording(network, x_t, t, text, low_res=None):
        calls.append((len(x_t), x_t.shape[-1], low_res))
        return forward(network, x_t, t, text, low_res=low_res)

    monkeypatch.setattr(TextUNet, "forward", recording)
    small = drawn(published, "--openai", "base.pt")
    assert [call[:2] for call in calls] == [(2, 64)] * 2  # with and without the caption
    calls.clear()
    large = drawn(published, "--openai", "base.pt", "--openai-upsampler", "upsample.pt")
    assert large.shape == (128, 128, 3) and [call[:2] for call in calls[2:]] == [(1, 128)] * 27
    torch.testing.assert_close(calls[-1][2][0], torch.from_numpy(small).permute(2, 0, 1) / 127.5 - 1)


def test_the_upsampler_enlarges_samples_of_our_networks(published):
    ours = ["--checkpoint", DOGS]
    small, large = drawn(published, *ours), drawn(published, *ours, "--openai-upsampler", "upsample.pt")
    assert small.shape == (64, 64, 3) and large.shape == (128, 128, 3)


def test_the_guidance_scale_is_that_of_the_flag(published):
    def at(scale):
        return drawn(published, "--openai", "base.pt", "--guidance-scale", scale)

    assert (at("3") == drawn(published, "--openai", "base.pt")).all()
    assert (at("0") != at("1")).any() and (at("1") != at("3")).any()


def test_both_published_networks_inpaint(published):
    flags = ["--image", "image.png", "--mask", "mask.png", "--openai", "base_inpaint.pt"]
    image, large = Image.open(published / "image.png"), ["--openai-upsampler", "upsample_inpaint.pt"]
    for size, more in ((64, []), (128, large)):
        there, images = np.array(image.resize((size, size), Image.BICUBIC)), drawn(published, *flags, *more)
        half = size // 2
        assert (images[:, :half] == there[:, :half]).all() and (images != there)[:, half:].mean() > 0.9


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--openai", "base.pt"], "base.pt cannot inpaint"),
        (["--openai", "base_inpaint.pt", "--openai-upsampler", "upsample.pt"], "upsample.pt cannot inpaint"),
        (["--openai-upsampler", "upsample_inpaint.pt"], "--openai-upsampler with --mask needs --openai"),
    ],
)
def test_networks_that_cannot_inpaint_are_refused(flags, line, published, capsys):
    with pytest.raises(SystemExit, match="2"):
        drawn(published, "--image", "image.png", "--mask", "mask.png", *flags)
    assert line in capsys.readouterr().err


@pytest.mark.parametrize("inpaint, count", [(False, 398_361_286), (True, 398_368_198)])
def test_parameters_of_the_published_upsamplers(inpaint, count):
    config = replace(config_from_openai(UPSAMPLER), out_channels=6)
    with torch.device("meta"):
        network = TextUNet(config, GLIDE_TEXT, inpaint, upsample=True)
    assert sum(p.numel() for p in network.parameters()) == count


def test_inpainting_keeps_known_pixels_and_samples_the_others(vocabulary):
    network, tokenizer = golden_network("glide_inpaint"), gpt2_tokenizer(vocabulary, 16)
    pipe = TextToImagePipeline(Model(network, BaseProcess(), {}), tokenizer)
    image, keep_mask = torch.rand(1, 3, 32, 32) * 2 - 1, torch.zeros(1, 1, 32, 32)
    keep_mask[..., :16] = 1

    def inpainted(image):
        inputs = InpaintInputs(image, keep_mask)
        sampler, unet_kwargs = inputs.make_sampler(network, SAMPLERS["ddpm"], 2, num_resamples=1)
        return pipe(["a", "b"], 5.0, 2, sampler, **unet_kwargs).tensor

    images, other = inpainted(image), inpainted(-image)
    torch.testing.assert_close(images[..., :16], image.expand(2, -1, -1, -1)[..., :16])
    assert (images[0] - images[1])[..., 16:].abs().mean() > 0.01
    assert (images - other)[..., 16:].abs().mean() > 0.001  # the network sees the known pixels


def test_masks_are_white_where_to_inpaint(tmp_path):
    Image.fromarray(np.full((100, 80, 3), 255, np.uint8)).save(tmp_path / "image.png")
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    inputs = InpaintInputs.load(tmp_path / "image.png", tmp_path / "mask.png", 256)
    assert inputs.image.shape == (1, 3, 256, 256) and inputs.image.min() == 1
    assert inputs.keep_mask[..., :128].max() == 0 and inputs.keep_mask[..., 128:].min() == 1


@pytest.mark.parametrize(
    "flags, line",
    [
        (["--vocabulary", "x"], "--vocabulary needs --openai"),
        (["--openai-upsampler", "x"], "--openai-upsampler needs --vocabulary"),
        (["--openai", "{}/none.pt", "--times", "3"], "--num-resamples has no effect with --openai"),
        (["--openai", "{}/none.pt", "--vocabulary", "{}", "--steps", "2000"], "steps 2000"),
        (["--openai", "{}/empty.pt", "--vocabulary", "{}"], "empty.pt is not the published network"),
        (["--image", "x", "--mask", "y", "--strength", "0.2"], "--strength has no effect with --mask"),
        (["--noise-level", "7"], "--noise-level needs --upsampler"),
        (["--openai", "{}/none.pt"], "--openai needs --vocabulary"),
        (["--openai", "{}/none.pt", "--vocabulary", "{}"], "none.pt cannot be read"),
        (["--openai", "{}/vocab.bpe", "--vocabulary", "{}"], "vocab.bpe is not the published network"),
        (["--openai", "{}/small.pt", "--vocabulary", "{}"], "small.pt is not the published network"),
        (["--openai", "{}/small.pt", "--vocabulary", "{}", "--mask", "x"], "--mask needs --image"),
        (["--openai", "{}/small.pt", "--vocabulary", "{}", "--image", "x"], "--openai needs --mask"),
        (["--openai", "{}/small.pt", "--vocabulary", "{}", "--out", "x.gif"], "with --openai name a .png"),
        (["--openai", "{}/small.pt", "--checkpoint", "x"], "leave one out"),
        (["--openai", "{}/module.pt", "--vocabulary", "{}"], "(it contains more than weights)"),
        (["--openai", "{}/small.pt", "--vocabulary", "{}/v"], "its encoder.json is not GPT-2's"),
        (["--checkpoint", DOGS, "--prompt", "\udcff"], "is not text in UTF-8"),
    ],
)
def test_errors_are_one_line(flags, line, vocabulary, capsys):
    torch.save(published_weights(golden_json("glide_base")["parameters"]), vocabulary / "small.pt")
    (vocabulary / "empty.pt").write_bytes(b"")
    torch.save(Recorder(), vocabulary / "module.pt")
    (vocabulary / "v").mkdir()
    (vocabulary / "v" / "encoder.json").write_text("{}")
    (vocabulary / "v" / "vocab.bpe").write_text("#version: 0.2\n")
    with pytest.raises(SystemExit, match="2"):
        run_command(sample.main, sample.Config, argv=[flag.format(vocabulary) for flag in flags])
    error = capsys.readouterr().err
    assert line in error and error.count("\n") == 1
