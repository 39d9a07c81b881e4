"""Fine-tuning OpenAI's networks: the start, what stays frozen, and the way back to their layout."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run_command
from common.errors import UserError
from common.training.checkpoints import load_training_state, load_weights, pretrained_path, save_weights
from common.training.optim import parameter_groups
from common.training.run_dir import saved_config
from lesson_03_adm.openai_checkpoints import config_from_openai
from lesson_04_text_conditioning.openai_checkpoints import (
    glide_from_openai,
    weights_from_openai,
    weights_to_openai,
)
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_06_miniglide import sample, train
from lesson_06_miniglide.image_data.captioned_images import load_images
from lesson_06_miniglide.model import build_from_metadata, build_network, set_trainable, unwrap
from lesson_06_miniglide.networks import export_openai, openai_glide
from lesson_06_miniglide.networks.export_openai import to_openai
from lesson_06_miniglide.networks.presets import PRESETS, SMALL
from lesson_06_miniglide.networks.upsampler import NoiseLevelConditioning, area_downsample
from lesson_06_miniglide.pipeline import MiniGlidePipeline, UpsamplerPipeline, load_upsampler
from lesson_06_miniglide.training.config import Config, resolved
from lesson_06_miniglide.training.distributed import DDPTrainer
from tests.test_golden import golden_json, published_weights
from tests.test_lesson_06_training import SMALL_TEXT, Noised, fill_zeros, loss_at_given_t
from tests.test_openai_glide import GOLDEN, published_name, vocabulary  # noqa: F401 (a fixture)

LESSON = "lesson_06_miniglide"
TEXT = TextConfig(50_257, context_length=8, width=32, layers=1, heads=2)
SMALL_64 = replace(PRESETS["tiny"].network, num_channels=16, channel_mult=(1, 2), num_head_channels=8)
FILES = {"glide": "base.pt", "glide_upsampler": "upsample.pt"}


@pytest.fixture
def published(vocabulary, monkeypatch):  # noqa: F811
    """A folder with base.pt and upsample.pt of small networks, GPT-2's two files, and photos with captions.

    The two presets and the settings of --openai are made as small.
    """
    torch.manual_seed(0)
    for name, settings, size in (
        ("glide", openai_glide.BASE, 64),
        ("glide_upsampler", openai_glide.UPSAMPLER, 128),
    ):
        small = {"image_size": size, "num_channels": 32, "channel_mult": (1, 1), "num_res_blocks": 1}
        small |= {"attention_resolutions": (16,), "num_head_channels": 16}
        preset = PRESETS[name]
        preset = replace(preset, network=replace(preset.network, **small), text=TEXT)
        monkeypatch.setitem(PRESETS, name, preset)
        small |= {"channel_mult": "1,1", "attention_resolutions": "16"}
        small |= {"text_ctx": 8, "xf_width": 32, "xf_layers": 1, "xf_heads": 2}
        for key, value in small.items():
            monkeypatch.setitem(settings, key, value)
        network = TextUNet(preset.network, TEXT, upsample=preset.upsample)
        weights = {published_name(n): 0.2 * torch.randn_like(w) for n, w in network.state_dict().items()}
        torch.save(weights, vocabulary / FILES[name])
    (vocabulary / "photos").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 256, (9, 9, 3), np.uint8)
        Image.fromarray(pixels).resize((150, 130)).save(vocabulary / "photos" / f"{i}.png")
        (vocabulary / "photos" / f"{i}.txt").write_text(f"dog {i}")
    monkeypatch.chdir(vocabulary)
    return vocabulary


def fine_tune(*flags, preset="glide", out="run"):
    """Fine-tune a published network for two steps."""
    few = ["--preset", preset, "--init-from", FILES[preset], "--vocabulary", ".", "--data-dir", "photos"]
    few += ["--out", out, "--steps", "2", "--batch-size", "1", "--preview-prompt", "a dog", "--device", "cpu"]
    run_train(*few, "--dry-run", *flags)


def run_train(*flags):
    run_command(train.main, train.Config, saved_config, argv=[*map(str, flags)])


def export(*flags):
    run_command(export_openai.main, export_openai.Config, argv=[*map(str, flags)])


def refused(capsys, call, *flags):
    """Return the line that a wrong call prints, after the progress bars of decoding."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        call(*flags)
    error = capsys.readouterr().err
    assert "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("error: ")]
    return line


def same(weights, others):
    """Return the names whose weights are the same, bit for bit."""
    assert weights.keys() == others.keys()
    return {name for name, weight in weights.items() if torch.equal(weight, others[name])}


# -- the layout ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_loading_and_writing_the_published_layout_changes_no_bit(name):
    settings = golden_json(name)
    published = published_weights(settings["parameters"])
    written = weights_to_openai(glide_from_openai(settings["config"], published).state_dict())
    assert same(published, written) == published.keys()
    again = glide_from_openai(settings["config"], written).state_dict()
    assert same(again, glide_from_openai(settings["config"], published).state_dict()) == again.keys()


def test_layers_that_resample_by_convolution_have_their_published_names():
    config = replace(SMALL, resblock_updown=False)
    weights = TextUNet(config, SMALL_TEXT).state_dict()
    written = weights_to_openai(weights)
    assert {name for name in written if ".op." in name} == {
        "input_blocks.3.0.op.weight",
        "input_blocks.3.0.op.bias",
    }
    assert any(name.startswith("output_blocks.") and name.endswith(".conv.weight") for name in written)
    assert weights_from_openai(written).keys() == weights.keys()


# -- the start -----------------------------------------------------------------------------------------------


def test_a_run_starts_from_the_published_weights_process_and_vocabulary(published, capsys):
    fine_tune("--learning-rate", "1e-12", "--ema-decay", "0")
    weights, metadata = load_weights("run", LESSON)
    start = weights_from_openai(torch.load("base.pt"))
    for name, weight in start.items():
        torch.testing.assert_close(weights[name], weight, rtol=0, atol=1e-6)
    assert weights.keys() == start.keys() and metadata["text"]["vocab_size"] == 50_257
    process, base = build_from_metadata(metadata).process, openai_glide.BaseProcess()
    assert torch.equal(process.betas, base.betas) and len(base.betas) == 1000
    tokens, mask = MiniGlidePipeline.load_tokenizer(metadata).encode(["A red corgi", ""])
    expected = openai_glide.gpt2_tokenizer(".", 8).encode(["a red corgi", ""])
    assert torch.equal(tokens, expected[0]) and torch.equal(mask, expected[1])


def test_the_upsampler_starts_as_the_published_one_at_every_noise_level(published):
    """It sees images of 4 times its input's side, with noise, and starts by ignoring the noise level."""
    fine_tune("--learning-rate", "1e-12", "--ema-decay", "0", preset="glide_upsampler")
    weights, metadata = load_weights("run", LESSON)
    network, process, _ = build_from_metadata(metadata)
    network.load_state_dict(weights)
    openai = openai_glide.load_network("upsample.pt", openai_glide.UPSAMPLER, "--x")
    x_t, t, low_res = torch.randn(2, 3, 128, 128), torch.tensor([3, 900]), torch.randn(2, 3, 32, 32)
    tokens = torch.arange(16).view(2, 8)
    for level in (0, 499):
        inputs = {"low_res": low_res, "noise_level": torch.full((2,), level)}
        ours = network(x_t, t, network.encode_text(tokens, tokens > 2), **inputs)
        theirs = openai(x_t, t, openai.encode_text(tokens, tokens > 2), low_res=low_res)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(process.betas[-1].item(), 0.02)  # linear, of 1000 timesteps
    x_0 = torch.rand(2, 3, 128, 128)
    target, inputs = PRESETS["glide_upsampler"].task(process, network, x_0)
    noise = (inputs["low_res"] - area_downsample(x_0, 32)).std((1, 2, 3))
    assert target is x_0 and (noise > 0.005).all() and inputs["noise_level"].max() < 500
    pipe = UpsamplerPipeline.from_pretrained("run", "cpu")
    assert pipe.super_resolve(torch.zeros(1, 3, 64, 64), ["a dog"], 0, steps=1).shape == (1, 3, 128, 128)
    with pytest.raises(UserError, match="enlarges 32x32 pixels, and --checkpoint draws 64x64"):
        load_upsampler("run", 0, "cpu", [MiniGlidePipeline.from_pretrained(None, "cpu")])


@pytest.mark.parametrize(
    "name, count, settings",
    [("glide", 385_030_726, openai_glide.BASE), ("glide_upsampler", 398_361_286, openai_glide.UPSAMPLER)],
)
def test_the_presets_have_the_published_sizes(name, count, settings):
    preset = PRESETS[name]
    assert replace(config_from_openai(settings), out_channels=6) == preset.network
    with torch.device("meta"):
        network = build_network(preset, preset.network, preset.text, torch.ones(1))
    assert sum(p.numel() for p in unwrap(network).parameters()) == count


def test_photos_are_decoded_at_the_size_of_the_preset(published):
    sizes = [load_images(Config(data_dir="photos"), PRESETS[name].data_size).images.shape for name in FILES]
    assert [shape[1] for shape in sizes] == [64, 128] and PRESETS["tiny_small"].data_size == 64


# -- what is trained -----------------------------------------------------------------------------------------


def of_text(name):
    return "text_encoder." in name


@pytest.mark.parametrize(
    "part, trained",
    [
        ("all", lambda name: True),
        ("unet", lambda name: not of_text(name)),
        ("text", lambda name: of_text(name) or ".text_kv." in name),
    ],
)
@pytest.mark.parametrize("preset", ["tiny", "tiny_upsampler"])
def test_only_the_chosen_part_is_in_the_optimizer(part, trained, preset):
    network = fill_zeros(build_network(PRESETS[preset], SMALL_64, SMALL_TEXT, torch.ones(1)))
    set_trainable(network, part)
    assert {n for n, p in network.named_parameters() if p.requires_grad} == {
        n for n, _ in network.named_parameters() if trained(n)
    }
    groups = parameter_groups(network, PRESETS[preset].lr_scales)
    in_optimizer = {id(p) for group in groups for p in group["params"]}
    assert in_optimizer == {id(p) for p in network.parameters() if p.requires_grad}


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("part", ["unet", "text"])
def test_gradients_of_a_part_are_those_of_the_whole(part, optimizer):
    """Also with activation checkpointing and micro-batches; the frozen rest keeps every bit."""

    def trainer(part, **settings):
        torch.manual_seed(0)
        network = fill_zeros(TextUNet(SMALL_64, SMALL_TEXT))
        set_trainable(network, part)
        settings |= {"device": "cpu", "precision": "fp32", "optimizer": optimizer}
        return DDPTrainer(network, loss_at_given_t, Noised(), resolved(Config(**settings)))

    whole = trainer("all", batch_size=4)
    frugal = trainer(part, batch_size=2, grad_accum=2, activation_checkpointing=True)
    before = {name: weight.clone() for name, weight in frugal.network.state_dict().items()}
    indices = torch.arange(4)
    for each in (whole, frugal):
        each.backward(indices)
    expected = dict(whole.network.named_parameters())
    for name, parameter in frugal.network.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-3, atol=1e-5)
        else:
            assert parameter.grad is None
    frugal.train_step(0.0)
    frozen = {name for name, p in frugal.network.named_parameters() if not p.requires_grad}
    assert frozen and same(before, frugal.network.state_dict()) == frozen
    assert same(before, frugal.ema.network.state_dict()) == frozen


def test_fine_tuning_the_text_with_all_that_saves_memory(published, capsys):
    """Captions are dropped, weights averaged and the rest is frozen; the setting cannot change later."""
    flags = ["--train", "text", "--activation-checkpointing", "--grad-accum", "2", "--caption-dropout", "0.5"]
    fine_tune(*flags)
    start = weights_from_openai(torch.load("base.pt"))
    state = load_training_state("run/checkpoints/step_0000002.pt")
    for weights in (load_weights("run", LESSON)[0], state["network"], state["ema"]):
        changed = weights.keys() - same(weights, start)
        assert changed == {name for name in start if of_text(name) or ".text_kv." in name}
    assert "--train was text and cannot change" in refused(
        capsys, run_train, "--resume", "run", "--train", "all"
    )
    (published / "base.pt").unlink()  # not needed any more
    run_train("--resume", "run", "--steps", "3")
    resumed, _ = load_weights("run", LESSON)
    assert resumed.keys() - same(resumed, start) == changed


# -- the way back --------------------------------------------------------------------------------------------


def test_a_fine_tuned_network_is_written_in_the_published_layout(published, capsys):
    fine_tune("--learning-rate", "0.01", "--ema-decay", "0")
    export("--checkpoint", "run", "--out", "new/dogs.pt")
    written, old = torch.load("new/dogs.pt", weights_only=True), torch.load("base.pt")
    assert {n: w.shape for n, w in written.items()} == {n: w.shape for n, w in old.items()}
    assert all(weight.is_contiguous() and weight.dtype == torch.float32 for weight in written.values())
    ours, _ = load_weights("run", LESSON)
    assert same(ours, weights_from_openai(written)) == ours.keys()
    assert len(same(written, old)) < len(old) / 2  # it was trained

    few = [
        "--prompt",
        "a red corgi",
        "--num-samples",
        "1",
        "--steps",
        "2",
        "--device",
        "cpu",
        "--out",
        "x.npz",
    ]
    run_command(sample.main, sample.Config, argv=["--openai", "new/dogs.pt", "--vocabulary", ".", *few])
    assert np.load("x.npz")["images"].shape == (1, 64, 64, 3)
    fine_tune("--init-from", "new/dogs.pt", "--learning-rate", "1e-12", "--ema-decay", "0", out="again")
    again, _ = load_weights("again", LESSON)
    for name, weight in weights_from_openai(written).items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=1e-6)


def test_an_exported_upsampler_is_the_network_at_one_noise_level(published):
    preset = PRESETS["glide_upsampler"]
    torch.manual_seed(0)
    network = fill_zeros(build_network(preset, preset.network, preset.text, torch.ones(1))).eval()
    assert isinstance(network, NoiseLevelConditioning)
    x_t, t, low_res = torch.randn(1, 3, 128, 128), torch.tensor([500]), torch.randn(1, 3, 32, 32)
    tokens = torch.arange(8)[None]
    exported = glide_from_openai(openai_glide.UPSAMPLER, to_openai(network, 70))
    with torch.no_grad():
        theirs = exported(x_t, t, exported.encode_text(tokens, tokens > 2), low_res=low_res)
        text = network.encode_text(tokens, tokens > 2)
        right, wrong = (
            network(x_t, t, text, low_res=low_res, noise_level=torch.tensor([level])) for level in (70, 0)
        )
    torch.testing.assert_close(theirs, right, rtol=1e-4, atol=1e-4)
    assert (theirs - wrong).abs().max() > 1e-2


# -- wrong input ---------------------------------------------------------------------------------------------


def test_starts_that_cannot_work(published, capsys):
    torch.save({"step": 1, "network": {}}, "state.pt")
    (published / "empty.pt").write_bytes(b"")
    broken = torch.load("base.pt")
    broken["out.2.bias"][0] = float("nan")
    torch.save(broken, "nan.pt")
    (published / "none").mkdir()
    before = {path for path in published.iterdir() if path.name != ".cache"}
    for flags, message in {
        ("--preset", "tiny"): "needs --preset glide or glide_upsampler",
        ("--defaults",): "needs --preset glide or glide_upsampler",
        ("--init-from", "state.pt"): "it has no weight 'input_blocks.0.0.weight'",
        ("--init-from", "empty.pt"): "empty.pt is not the published network",
        ("--init-from", "nowhere.pt"): "nowhere.pt cannot be read",
        ("--init-from", "nan.pt"): "not finite (in out.2.bias)",
        ("--init-from", "upsample.pt"): "these weights do not fit",
        ("--num-channels", "64"): "these weights do not fit",
        ("--vocabulary", "none"): "--vocabulary none lacks encoder.json",
        ("--timesteps", "100"): "was trained with 1000 timesteps",
        ("--no-vlb",): "leave out --no-vlb",
        ("--text-encoder", "t5-small"): "leave out --text-encoder",
        ("--train", "vae"): "--train vae is unknown; choose all, unet, text",
        ("--preset", "glide_upsampler"): "these weights do not fit",
    }.items():
        assert message in refused(capsys, fine_tune, *flags), flags
    without = ["--preset", "glide", "--init-from", "base.pt", "--data-dir", "photos", "--out", "run"]
    assert "base.pt needs --vocabulary" in refused(capsys, run_train, *without)
    flags = ["--preset", "glide_upsampler", "--out", "run"]
    assert "shapes have 64x64 pixels" in refused(capsys, run_train, *flags)
    assert {path for path in published.iterdir() if path.name != ".cache"} == before


def test_networks_that_cannot_be_written(published, capsys):
    fine_tune()
    _, metadata = load_weights("run", LESSON)
    for name, changes in {
        "no_variance": {"network": metadata["network"] | {"out_channels": 3}},
        "own_words": {"text": metadata["text"] | {"vocab_size": 300}},
    }.items():
        network = build_from_metadata(metadata | changes).network
        save_weights(published / f"{name}.safetensors", network.state_dict(), metadata | changes)
    (published / "file").write_text("")
    before = set(published.rglob("*"))
    run = ["--checkpoint", "run", "--out", "new.pt"]
    for flags, message in {
        ("--checkpoint", "none.safetensors"): "--checkpoint none.safetensors does not exist",
        ("--checkpoint", "no_variance.safetensors"): "does not learn its variance",
        ("--checkpoint", "own_words.safetensors"): "a vocabulary of 300 tokens and not GPT-2's",
        ("--checkpoint", pretrained_path(LESSON)): "predicts velocity and not noise",
        ("--out", "base.pt"): "--out base.pt exists already",
        ("--out", "new.safetensors"): "must end in .pt",
        ("--out", "file/new.pt"): "--out file cannot be created or written",
        ("--noise-level", "-1"): "--noise-level is -1; it must be a timestep",
        ("--noise-level", "3"): "--noise-level is 3; this network has levels from 0 to 0",
    }.items():
        assert message in refused(capsys, export, *run, *flags), flags
    assert set(published.rglob("*")) == before
