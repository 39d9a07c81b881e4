"""Lesson 6's presets and its trainer: sizes, micro-batches, two processes, memory, resuming after kill -9."""

import copy
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import tyro
from PIL import Image
from torch import nn

from common.cli import run_command
from common.errors import UserError
from common.files import read_json
from common.training.checkpoints import load_weights, save_weights
from common.training.metrics_csv import read_metrics
from common.training.run_dir import Recorder, RunDir, saved_config
from common.training.trainer import batch_indices
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_05_cfg import train_mnist as lesson_5
from lesson_06_miniglide import train as lesson_6
from lesson_06_miniglide.model import build_network, make_diffusion, parameter_counts, resolve_configs
from lesson_06_miniglide.networks.presets import PRESETS, TINY, TINY_TEXT, shifted_cosine_betas
from lesson_06_miniglide.train import reference_csv
from lesson_06_miniglide.training import distributed
from lesson_06_miniglide.training.config import Config, resolved
from lesson_06_miniglide.training.distributed import DDPTrainer, checkpoint_activations, compile_network
from tests.conftest import ROOT
from tests.test_training import assert_same, final_state

SMALL = replace(TINY, num_channels=8, channel_mult=(1, 2), num_head_channels=8)
SMALL_TEXT = TextConfig(300, context_length=4, width=16, layers=1, heads=2)


def fill_zeros(network):
    """Give weights that start at zero other values, so that every layer has an effect."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def small_network():
    torch.manual_seed(0)
    return fill_zeros(TextUNet(SMALL, SMALL_TEXT))


class Noised:
    """Images that come with their own t and noise, so that no generator decides what a process sees."""

    name = "noised"

    def __len__(self):
        return 40

    def batch(self, indices):
        generators = [torch.Generator().manual_seed(i) for i in indices.tolist()]
        x_0 = torch.stack([torch.randn(3, 64, 64, generator=g) for g in generators]).clamp(-1, 1)
        noise = torch.stack([torch.randn(3, 64, 64, generator=g) for g in generators])
        return x_0, indices * 20, noise, indices[:, None].expand(-1, 4)


def loss_at_given_t(network, x_0, t, noise, tokens):
    text = network.encode_text(tokens, torch.ones_like(tokens, dtype=torch.bool))
    diffusion = make_diffusion(PRESETS["tiny"])
    return loss_hybrid(diffusion, lambda x_t, t: network(x_t, t, text), x_0, t, noise)


# -- networks ------------------------------------------------------------------------------------------------


def test_parameters_of_the_presets():
    with torch.device("meta"):
        counts = {
            name: parameter_counts(build_network(preset, preset.network, preset.text, torch.ones(1)))
            for name, preset in PRESETS.items()
        }
    assert counts["report"]["total"] == 156_947_494  # what miniGLIDE's notebooks print
    assert counts["glide"]["total"] == 385_030_726  # the published GLIDE
    assert counts["tiny"]["total"] <= 1_600_000 and TINY_TEXT.vocab_size <= 2000
    for count in counts.values():
        assert sum(count.values()) == 2 * count["total"]
        assert min(count.values()) > 0
    report = counts["report"]  # counted by hand from the settings
    assert report["token embeddings"] == 50_257 * 512
    assert report["text transformer"] == 16 * (12 * 512 * 512 + 13 * 512) + 2 * 128 * 512 + 1024 + 513 * 384


def test_the_shifted_schedule_has_a_quarter_of_the_signal_to_noise_ratio():
    usual, shifted = (GaussianDiffusion(betas(1000)) for betas in (cosine_betas, shifted_cosine_betas))
    ratio = [d.alpha_bar / (1 - d.alpha_bar) for d in (usual, shifted)]
    torch.testing.assert_close(ratio[0], 4 * ratio[1], rtol=1e-4, atol=0.0)


def test_patches_lose_nothing():
    """A patch's pixels are the input channels of the first layer, and come out where they went in."""
    network = small_network()
    seen = []
    network.unet.conv_in.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    network.unet.conv_out.register_forward_hook(lambda *_: torch.cat([seen[0], -seen[0]], 1))
    x_t = torch.randn(2, 3, 64, 64)
    text = network.encode_text(torch.zeros(2, 4).long(), torch.ones(2, 4) > 0)
    output = network(x_t, torch.zeros(2).long(), text)
    assert seen[0].shape == (2, 12, 32, 32) and output.shape == (2, 6, 64, 64)
    assert torch.equal(output[:, :3], x_t) and torch.equal(output[:, 3:], -x_t)


def test_flags_override_the_preset_and_are_checked():
    network, text = resolve_configs(
        Config(preset="report", num_channels=64, num_res_block=1, xf_layers=2, no_vlb=True)
    )
    assert (network.num_channels, network.num_res_blocks, text.layers, network.out_channels) == (64, 1, 2, 3)
    with pytest.raises(UserError, match=r"cannot be split into heads of 36; change --num-channels"):
        resolve_configs(Config(preset="report", num_head_channels=36))


def test_activation_checkpointing_changes_no_gradient_and_saves_memory():
    def count_saved(compute):
        """Return what is computed, and how many numbers are kept for the backward pass."""
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):
            return compute(), sum(numbers)

    def run(checkpointed):
        network = small_network()
        if checkpointed:
            checkpoint_activations(network)
        batch = Noised().batch(torch.arange(2))
        tokens = batch[-1]
        _, of_text = count_saved(lambda: network.encode_text(tokens, tokens >= 0))
        loss, of_all = count_saved(lambda: loss_at_given_t(network, *batch).mean())
        loss.backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()]), of_text, of_all

    (plain, text, everything), (again, less_text, less) = run(False), run(True)
    assert torch.allclose(plain, again, atol=1e-6)
    assert less_text < text / 2 and less < everything / 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_network_is_one_graph_and_has_the_same_gradients(checkpointed, no_type_checks):
    compiled = []

    def keep(graph, inputs):
        compiled.append(graph)
        return graph

    def gradients(network):
        x_0, t, noise, tokens = Noised().batch(torch.arange(2))
        loss_at_given_t(network, x_0, t, noise, tokens).mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    plain, network = small_network(), small_network()
    if checkpointed:
        checkpoint_activations(network)
    compile_network(network, backend=keep, fullgraph=True)  # where a graph would break, this raises
    assert torch.allclose(gradients(plain), gradients(network), atol=1e-6)
    assert len(compiled) == 2  # the text encoder's and the UNet's


def test_the_text_encoder_is_compiled_inside_the_wrappers(no_type_checks):
    compiled = []

    def keep(graph, inputs):
        compiled.append(graph)
        return graph

    network = build_network(PRESETS["tiny"], SMALL, SMALL_TEXT, make_diffusion(PRESETS["tiny"]).alpha_bar)
    compile_network(network, backend=keep, fullgraph=True)
    text = network.encode_text(torch.zeros(2, 4).long(), torch.ones(2, 4) > 0)
    assert len(compiled) == 1
    network(torch.randn(2, 3, 64, 64), torch.zeros(2).long(), text)
    assert len(compiled) == 2


# -- training ------------------------------------------------------------------------------------------------


def test_a_compiled_run_takes_the_same_steps_and_can_be_resumed_without(monkeypatch, no_type_checks):
    monkeypatch.setattr(distributed, "compile_network", partial(compile_network, backend="eager"))

    def trainer(compiled, state=None):
        settings = {"device": "cpu", "batch_size": 2, "optimizer": "adamw", "precision": "fp32"}
        config = resolved(Config(compile=compiled, **settings))
        return DDPTrainer(small_network(), loss_at_given_t, Noised(), config, state=copy.deepcopy(state))

    def gradients(trainer):
        return torch.cat([p.grad.flatten() for p in trainer.network.parameters()])

    plain, compiled = trainer(False), trainer(True)
    rows = [each.train_step(0.0) for each in (plain, compiled)]
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-5)
    assert close(gradients(plain), gradients(compiled))
    state = compiled.state()
    assert state["network"].keys() == plain.state()["network"].keys()
    resumed = [trainer(False, state), trainer(True, state)]
    losses = [each.train_step(0.0)["loss"] for each in (compiled, *resumed)]
    assert losses == pytest.approx(3 * [losses[0]], rel=1e-5)


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * a.abs().max()


def test_micro_batches_give_the_gradients_of_the_whole_batch():
    from tests.two_processes import gradients

    whole = gradients(16, 1)
    assert close(whole, gradients(8, 2)) and close(whole, gradients(4, 4))
    assert not close(whole, gradients(8, 1))


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(*command, cwd):
    done = subprocess.run([*TORCHRUN, *map(str, command)], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_each_process_draws_its_own_t_and_noise_and_draws_it_again():
    def drawn(rank, step):
        trainer = object.__new__(DDPTrainer)
        trainer.config, trainer.step, trainer.rank, trainer.world = Config(seed=3), step, rank, 2
        trainer.seed_step()
        return torch.rand(3).tolist()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({tuple(drawn(rank, step)) for rank in (0, 1) for step in (5, 6)}) == 4


def test_the_logged_loss_is_the_mean_over_all_images():
    settings = {"learning_rate": 0.0, "optimizer": "adamw", "device": "cpu", "precision": "fp32"}
    config = Config(batch_size=2, grad_accum=3, **settings)
    trainer = DDPTrainer(small_network(), loss_at_given_t, Noised(), config)
    row = trainer.train_step(0.0)
    with torch.no_grad():
        each = loss_at_given_t(trainer.network, *Noised().batch(batch_indices(0, 40, 6, 0)))
    assert row["loss"] == pytest.approx(each.mean().item(), rel=1e-4)


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(tmp_path):
    from tests.two_processes import gradients

    torchrun("-m", "tests.two_processes", tmp_path, cwd=ROOT)
    assert close(gradients(16, 1), torch.load(tmp_path / "gradients.pt"))


@pytest.fixture
def tiny_data(tmp_path):
    """A folder with data/, twelve small images whose captions are in .txt files next to them."""
    (tmp_path / "data").mkdir()
    for i in range(12):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 30, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "data" / f"{i:02}.png")
        (tmp_path / "data" / f"{i:02}.txt").write_text(f"number {i}")
    return tmp_path


TRAIN = str(ROOT / "lesson_06_miniglide" / "train.py")
FEW = ["--data-dir", "data", "--num-channels", "24", "--num-head-channels", "8", "--xf-layers", "1"]
FEW += ["--preview-prompt", "a", "--batch-size", "2", "--steps", "4", "--checkpoint-every", "2"]
FEW += ["--device", "cpu"]


def run_in_process(*flags):
    run_command(lesson_6.main, Config, saved_config, [*map(str, flags)])


def refused(capsys, *flags):
    """Return the line that a wrong call prints."""
    with pytest.raises(SystemExit) as stop:
        run_in_process(*flags)
    err = capsys.readouterr().err
    assert stop.value.code == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def test_two_processes_write_one_run_and_resume_it(tiny_data):
    printed = torchrun(TRAIN, *FEW, "--out", "whole", cwd=tiny_data)
    assert printed.count("run: whole") == 2  # first and last, of one process
    whole = final_state(tiny_data / "whole")
    for suffix in ("pt", "safetensors"):
        (tiny_data / "whole" / "checkpoints" / f"step_0000004.{suffix}").unlink()
    torchrun(TRAIN, "--continue-train", "whole", cwd=tiny_data)
    again = final_state(tiny_data / "whole")
    assert again["step"] == 4 and read_metrics(tiny_data / "whole" / "metrics.csv")[-1]["validation_loss"] > 0
    assert_same(whole, again)


def test_ctrl_c_saves_in_two_processes(tiny_data):
    """A terminal sends it to every process, and torchrun once more to its own."""
    command = [*TORCHRUN, TRAIN, *FEW, "--steps", "500", "--checkpoint-every", "9999", "--out", "run"]
    metrics, checkpoints = tiny_data / "run" / "metrics.csv", tiny_data / "run" / "checkpoints"
    run = subprocess.Popen(command, cwd=tiny_data, start_new_session=True, stderr=subprocess.DEVNULL)
    while not (metrics.exists() and len(read_metrics(metrics)) > 2) and run.poll() is None:
        time.sleep(0.01)
    os.killpg(run.pid, signal.SIGINT)
    run.wait()
    last = read_metrics(metrics)[-1]["step"]
    assert last < 500, "stopped too late"
    assert (checkpoints / f"step_{last:07}.pt").exists(), sorted(checkpoints.iterdir())


def test_kill_9_and_resume_bit_for_bit(tiny_data):
    def start(*flags):
        command = [sys.executable, TRAIN, *flags]
        return subprocess.Popen(
            command, cwd=tiny_data, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    whole = start(*FEW, "--out", "whole")
    assert whole.communicate() and whole.returncode == 0
    cut = start(*FEW, "--out", "cut")
    while not (tiny_data / "cut" / "checkpoints" / "step_0000002.pt").exists() and cut.poll() is None:
        time.sleep(0.005)
    cut.send_signal(signal.SIGKILL)
    cut.communicate()
    assert not (tiny_data / "cut" / "checkpoints" / "step_0000004.pt").exists(), "killed too late"
    resumed = start("--resume", "cut")
    _, err = resumed.communicate()
    assert resumed.returncode == 0, err
    assert_same(final_state(tiny_data / "whole"), final_state(tiny_data / "cut"))


def test_a_resume_that_does_not_fit_leaves_the_run_as_it_was(tiny_data, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    run_in_process(*FEW, "--out", "run")
    config = (tiny_data / "run" / "config.json").read_text()
    for flags, message in {
        ("--timesteps", "500"): "--timesteps was 1000 and cannot change",
        ("--num-channels", "48"): "--num-channels was 24 and cannot change",
        ("--out", "elsewhere"): "continues in that folder; leave out --out elsewhere",
        ("--image-limit", "5"): "was trained on data, 11 images, the data now is data, 4 images",
    }.items():
        assert message in refused(capsys, "--resume", "run", *flags)
    assert (tiny_data / "run" / "config.json").read_text() == config
    assert not (tiny_data / "elsewhere").exists()


def test_defaults_are_the_original_whatever_else_is_given():
    config = resolved(Config(defaults=True, num_channels=64, xf_layers=2, batch_size=99))
    network, text = resolve_configs(config)
    assert (network.num_channels, text.layers, config.batch_size, config.timesteps) == (96, 16, 8, 100)


def test_a_preset_has_its_own_learning_rate_batch_and_optimizer():
    def of(**flags):
        config = resolved(Config(**flags))
        return config.learning_rate, config.batch_size, config.optimizer

    assert (of(), of(preset="glide")) == ((6e-3, 128, "muon"), (1e-4, 32, "adamw"))
    assert of(learning_rate=1e-3, batch_size=7, optimizer="adamw") == (1e-3, 7, "adamw")


@pytest.mark.parametrize("name", PRESETS)
def test_the_learning_rate_of_the_text_encoder_is_that_of_the_preset(name):
    """The prefix fits the parameter names of every preset's wrappers, which the trainer checks."""
    preset = PRESETS[name]
    network = build_network(preset, replace(SMALL, num_channels=16), SMALL_TEXT, torch.ones(1))
    trainer = DDPTrainer(
        network, loss_at_given_t, Noised(), resolved(Config(device="cpu")), lr_scales=preset.lr_scales
    )
    names = {id(p): n for n, p in network.named_parameters()}
    scales = {names[id(p)]: g["lr_scale"] for g in trainer.optimizer.param_groups for p in g["params"]}
    assert len(scales) == len(names)
    of_text = {scale for name, scale in scales.items() if "text_encoder." in name}
    assert of_text == {preset.text_lr_scale}
    assert {scale for name, scale in scales.items() if "text_encoder." not in name} == {1.0}


def test_delcheck_keeps_the_latest_three_checkpoints(tiny_data, monkeypatch):
    monkeypatch.chdir(tiny_data)
    for flags, kept in (([], (1, 2, 3, 4, 5)), (["--delcheck"], (3, 4, 5))):
        out = f"run{len(flags)}"
        run_in_process(*FEW, "--steps", "5", "--checkpoint-every", "1", "--out", out, *flags)
        names = sorted(path.name for path in (tiny_data / out / "checkpoints").glob("step_*.pt"))
        assert names == [f"step_{i:07}.pt" for i in kept]


def test_the_flags_for_large_networks(tiny_data, monkeypatch):
    monkeypatch.chdir(tiny_data)
    flags = ["--grad-accum", "2", "--activation-checkpointing", "--precision", "bf16", "--batch-size", "1"]
    flags += ["--sample-every", "2", "--validation-fraction", "0.5"]
    run_in_process(*FEW, "--out", "run", *flags)
    assert len(list((tiny_data / "run" / "samples").glob("*.png"))) == 2
    metrics = read_json(tiny_data / "run" / "metrics.json")
    assert (metrics["images"], metrics["captions_cut"]) == (6, 0)


def test_a_loss_is_plotted_next_to_that_of_a_comparable_run():
    results = ROOT / "lesson_06_miniglide" / "results"
    assert reference_csv(Config()) == results / "metrics.csv"
    assert reference_csv(Config(data_dir="photos", dogs=True)) == results / "dogs" / "metrics.csv"
    for other in ({"data_dir": "photos"}, {"preset": "tiny_small"}, {"no_vlb": True}):
        assert reference_csv(Config(**other)) is None


def test_captions_are_dropped_by_default():
    assert Config().caption_dropout == 0.2


@pytest.mark.parametrize(
    "config_type, old, new, value",
    [
        (Config, "--start-from", "--init-from", "run"),
        (Config, "--drop-caption", "--caption-dropout", "0.5"),
        (Config, "--caption", "--preview-prompt", "a dog"),
        (Config, "--continue-train", "--resume", "run"),
        (Config, "--checkpoint-dir", "--out", "folder"),
        (lesson_5.Config, "--drop-caption", "--caption-dropout", "0.5"),
    ],
)
def test_the_old_spelling_of_a_flag_still_works(config_type, old, new, value):
    configs = [tyro.cli(config_type, args=[flag, value]) for flag in (old, new)]
    assert configs[0] == configs[1] != config_type()
    if old == "--caption":
        args = ["--caption", "a", "--preview-prompt", "b", "--caption", "c"]
        assert tyro.cli(config_type, args=args).preview_prompt == ("a", "b", "c")


def test_the_tokenizer_comes_with_the_weights_to_start_from(tiny_data, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    layers = FEW.index("--xf-layers")
    few = FEW[:layers] + FEW[layers + 2 :]
    run_in_process(*few, "--out", "first")
    for flag in ("--text-encoder", "--vocabulary"):
        line = refused(capsys, *few, "--init-from", "first", flag, "x", "--out", "second")
        assert "leave out --text-encoder" in line
    line = refused(capsys, *FEW, "--text-encoder", "x", "--out", "second")
    assert "--xf-layers and --xf-heads have no effect" in line
    assert not (tiny_data / "second").exists()


def test_a_run_can_start_from_the_weights_of_another(tiny_data, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    run_in_process(*FEW, "--out", "first")
    first, metadata = load_weights("first", "lesson_06_miniglide")
    flags = [*FEW, "--init-from", "first", "--steps", "1", "--ema-decay", "0", "--learning-rate", "1e-12"]
    run_in_process(*flags, "--out", "second")
    second, again = load_weights("second", "lesson_06_miniglide")
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=1e-6)
    assert again["tokenizer"] == metadata["tokenizer"]
    run_in_process(*flags, "--preset", "tiny_inpainting", "--out", "inpainting")
    wider, _ = load_weights("inpainting", "lesson_06_miniglide")
    changed = {name for name in first if wider[name].shape != first[name].shape}
    assert wider.keys() == first.keys() and changed == {"network.unet.conv_in.weight"}
    conv_in = wider["network.unet.conv_in.weight"]
    torch.testing.assert_close(conv_in[:, :12], first["network.unet.conv_in.weight"], rtol=0, atol=1e-6)
    assert conv_in.shape[1] == 28 and conv_in[:, 12:].abs().max() < 1e-6  # known pixels and mask: ignored


def test_weights_of_other_networks_are_no_start(tiny_data, monkeypatch, capsys):
    monkeypatch.chdir(tiny_data)
    run_in_process(*FEW, "--out", "first")
    weights, metadata = load_weights("first", "lesson_06_miniglide")
    without_wrapper = {name.removeprefix("network."): weight for name, weight in weights.items()}
    save_weights(tiny_data / "other.safetensors", without_wrapper, metadata)
    clip = {name: value for name, value in metadata.items() if name not in ("network", "text", "tokenizer")}
    save_weights(tiny_data / "clip.safetensors", weights, clip)
    for flags, message in {
        ("first", "--num-channels", "48"): "--init-from first: these weights do not fit",
        ("other.safetensors",): "--init-from other.safetensors: these weights do not fit",
        ("clip.safetensors",): "--init-from clip.safetensors is not a text-to-image network",
        ("nowhere",): "--init-from nowhere does not exist",
    }.items():
        assert message in refused(capsys, *FEW, "--out", "second", "--init-from", *flags)
    assert not (tiny_data / "second").exists()


def run_small(tmp_path, **settings):
    config = resolved(Config(out=str(tmp_path / "run"), device="cpu", batch_size=2, **settings))
    recorder = Recorder(RunDir("lesson_06_miniglide", config, "x", keep_last=None), {})
    DDPTrainer(small_network(), loss_at_given_t, Noised(), config, callbacks=[recorder]).fit()
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*.pt"))


def test_checkpoints_by_the_clock(tmp_path):
    assert len(run_small(tmp_path / "often", steps=3, checkpoint_time=1e-6)) == 3
    assert len(run_small(tmp_path / "seldom", steps=3, checkpoint_time=1e6)) == 1  # the last


def test_a_process_that_writes_nothing_knows_when_a_checkpoint_was(tmp_path):
    """Otherwise it would compute the validation loss after every step, and all others would wait for it."""
    config = resolved(Config(device="cpu", batch_size=2, checkpoint_time=600))
    trainer = DDPTrainer(small_network(), loss_at_given_t, Noised(), config, rank=1)
    due = []
    for trainer.minutes in (1, 9, 10, 11, 19, 20):
        due.append(trainer.checkpoint_is_due())
        if due[-1]:
            trainer.validation_loss()
    assert due == [False, False, True, False, False, True]


def test_only_the_first_process_has_callbacks(tmp_path):
    config = resolved(Config(out=str(tmp_path / "run"), device="cpu", batch_size=2))
    recorder = Recorder(RunDir("lesson_06_miniglide", config, "x"), {})
    for rank, callbacks in ((0, [recorder]), (1, [])):
        trainer = DDPTrainer(
            small_network(), loss_at_given_t, Noised(), config, callbacks=[recorder], rank=rank
        )
        assert list(trainer.callbacks) == callbacks and trainer.quiet == (rank > 0)


def test_the_samples_need_only_the_checkpoint(tiny_data):
    flags = ["--epochs", "1", "--steps", "99", "--no-vlb", "--timesteps", "10", "--out", "r"]
    command = [sys.executable, TRAIN, *FEW, *flags]
    done = subprocess.run(command, cwd=tiny_data, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    _, metadata = load_weights(tiny_data / "r", "lesson_06_miniglide")
    assert metadata["step"] == 6  # 11 images (one is held out) in batches of 2, once
    assert metadata["config"]["timesteps"] == 10 and "--no-vlb" in metadata["command"]
    assert read_json(tiny_data / "r" / "metrics.json")["images"] == 11
    script = str(ROOT / "lesson_06_miniglide" / "sample.py")
    sample = [sys.executable, script, "--checkpoint", "r", "--steps", "3"]
    done = subprocess.run([*sample, "--prompt", "number 3"], cwd=tiny_data, capture_output=True, text=True)
    assert done.returncode == 0 and (tiny_data / "samples.png").exists(), done.stderr
