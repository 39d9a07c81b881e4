"""Lesson 6's presets and its trainer: sizes, micro-batches, two processes, memory, resuming after kill -9."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from common.command import UserError
from common.runs import Run, load_weights, read_json, read_metrics
from common.training import batch_indices
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_06_miniglide.big_trainer import BigTrainer, checkpoint_activations, compile_network
from lesson_06_miniglide.captioned_images import captioned_images, make_tokenizer
from lesson_06_miniglide.patches import PatchUNet
from lesson_06_miniglide.presets import (
    PRESETS,
    TINY,
    TINY_TEXT,
    budget,
    new_diffusion,
    new_network,
    noisier_cosine_betas,
    settings_of,
)
from lesson_06_miniglide.sketch import PatchSketchingUNet, learn_to_sketch
from lesson_06_miniglide.train import Config, resolved, shipped_curve
from tests.conftest import ROOT
from tests.test_training import assert_same, final_state

SMALL = replace(TINY, num_channels=8, channel_mult=(1, 2), num_head_channels=8)
SMALL_TEXT = TextConfig(300, context=4, width=16, layers=1, heads=2)


def filled(network):
    """With weights that are zero at the start filled in, so that everything has an effect."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network


def small_network():
    torch.manual_seed(0)
    return filled(PatchUNet(SMALL, SMALL_TEXT))


def flags():
    """Pictures of two colours, left and right, with captions that differ in the order of words alone."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
    pairs = [(a, b) for a in colours for b in colours if a != b]
    images = np.zeros((len(pairs), 8, 8, 3), np.uint8)
    for image, (left, right) in zip(images, pairs):
        image[:, :4], image[:, 4:] = colours[left], colours[right]
    data = captioned_images("flags", images, [f"{a} left of {b}" for a, b in pairs])
    return data.tokenized(make_tokenizer(data.captions, SMALL_TEXT))


def test_the_text_learns_to_sketch_before_there_is_a_network_to_read_for():
    torch.manual_seed(0)
    data, network = flags(), PatchSketchingUNet(SMALL, SMALL_TEXT, new_diffusion(1000).alpha_bar)
    before = {name: p.clone() for name, p in network.named_parameters()}
    learn_to_sketch(network, data, steps=200, quiet=True)
    x_0, tokens, mask = data.first(6)
    with torch.no_grad():
        sketched = network.sketch(network.encode_text(tokens, mask))
        nothing = network.sketch(network.encode_text(tokens, mask & False))[0]
    assert (sketched - x_0).square().mean() < 0.05 * x_0.var()
    assert (nothing - x_0.mean(0)).square().mean() < 0.05 * x_0.var()
    changed = {
        name.split(".")[0] for name, p in network.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {"text", "sketch"}


def test_the_network_sees_the_sketch_of_its_own_caption():
    torch.manual_seed(0)
    network = PatchSketchingUNet(SMALL, SMALL_TEXT, new_diffusion(1000).alpha_bar)
    filled(network).requires_grad_(False)
    text = network.encode_text(torch.tensor([[1, 2, 3, 4], [4, 3, 2, 1]]), torch.ones(2, 4) > 0)
    x_t, t = torch.randn(2, 3, 64, 64), torch.tensor([999, 999])
    before = network(x_t, t, text)
    network.sketch.from_embedding.weight[:] = 0
    network.sketch.from_values.weight[:] = 0
    network.sketch.from_embedding.bias[:] = 0.3  # flat: there is nothing to be seen
    blank = network(x_t, t, text)
    assert not torch.allclose(before, blank, atol=1e-3)
    network.unet.first.weight[:, 12:] += 1
    assert torch.allclose(network(x_t, t, text), blank, atol=1e-4)


class Noised:
    """Images that come with their own t and noise, so that no generator decides what a process sees."""

    def __len__(self):
        return 40

    def batch(self, indices):
        parts = [torch.Generator().manual_seed(i) for i in indices.tolist()]
        x_0 = torch.stack([torch.randn(3, 64, 64, generator=g) for g in parts]).clamp(-1, 1)
        noise = torch.stack([torch.randn(3, 64, 64, generator=g) for g in parts])
        return x_0, indices * 20, noise, indices[:, None].expand(-1, 4)


def at_given_t(network, x_0, t, noise, tokens):
    text = network.encode_text(tokens, torch.ones_like(tokens, dtype=torch.bool))
    return loss_hybrid(new_diffusion(1000), lambda x_t, t: network(x_t, t, text), x_0, t, noise)


# -- networks ------------------------------------------------------------------------------------------------


def test_parameters_of_the_presets():
    with torch.device("meta"):
        counts = {n: budget(new_network(n, *PRESETS[n][:2], torch.ones(1))) for n in PRESETS}
    assert counts["report"]["in all"] == 156_947_494  # what miniGLIDE's notebooks print
    assert counts["glide"]["in all"] == 385_030_726  # the published GLIDE
    assert counts["tiny"]["in all"] <= 1_600_000 and TINY_TEXT.vocab_size <= 2000
    for count in counts.values():
        assert sum(count.values()) == 2 * count["in all"]
        assert min(n for name, n in count.items() if name != "sketch") > 0
    report = counts["report"]  # counted by hand from the settings
    assert report["token embeddings"] == 50_257 * 512
    assert report["text transformer"] == 16 * (12 * 512 * 512 + 13 * 512) + 2 * 128 * 512 + 1024 + 513 * 384


def test_the_noisier_schedule_has_a_quarter_of_the_signal_to_noise_ratio():
    usual, noisier = (GaussianDiffusion(betas(1000)) for betas in (cosine_betas, noisier_cosine_betas))
    ratio = [d.alpha_bar / (1 - d.alpha_bar) for d in (usual, noisier)]
    torch.testing.assert_close(ratio[0], 4 * ratio[1], rtol=1e-4, atol=0.0)


def test_patches_lose_nothing():
    """A patch's pixels go through the network inside as its channels, and come out where they went in."""
    network = small_network()
    network.unet.forward = lambda x, t, embedding, context: torch.cat([x, -x], 1)[:, [*range(0, 24)]]
    x_t = torch.randn(2, 3, 64, 64)
    output = network(
        x_t, torch.zeros(2).long(), network.encode_text(torch.zeros(2, 4).long(), torch.ones(2, 4) > 0)
    )
    assert output.shape == (2, 6, 64, 64)
    assert torch.equal(output[:, :3], x_t) and torch.equal(output[:, 3:], -x_t)


def test_flags_change_the_preset_and_are_checked():
    network, text = settings_of(
        Config(preset="report", num_channels=64, num_res_block=1, xf_layers=2, no_vlb=True)
    )
    assert (network.num_channels, network.num_res_blocks, text.layers, network.out_channels) == (64, 1, 2, 3)
    with pytest.raises(UserError, match=r"cut into heads of 36; change --num-channels"):
        settings_of(Config(preset="report", num_head_channels=36))


def test_activation_checkpointing_changes_no_gradient_and_saves_memory():
    def kept(compute):
        """(What is computed, how many numbers are kept for the way back.)"""
        numbers = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: numbers.append(x.numel()) or x, lambda x: x):
            return compute(), sum(numbers)

    def run(checkpointed):
        network = small_network()
        if checkpointed:
            checkpoint_activations(network)
        batch = Noised().batch(torch.arange(2))
        tokens = batch[-1]
        _, of_text = kept(lambda: network.encode_text(tokens, tokens >= 0))
        loss, of_all = kept(lambda: at_given_t(network, *batch).mean())
        loss.backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()]), of_text, of_all

    (plain, text, everything), (again, less_text, less) = run(False), run(True)
    assert torch.allclose(plain, again, atol=1e-6)
    assert less_text < text / 2 and less < everything / 2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_a_compiled_network_is_of_one_piece_and_has_the_same_gradients(checkpointed):
    compiled = []

    def keep(graph, inputs):
        compiled.append(graph)
        return graph

    def gradients(network):
        x_0, t, noise, tokens = Noised().batch(torch.arange(2))
        at_given_t(network, x_0, t, noise, tokens).mean().backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()])

    plain, network = small_network(), small_network()
    if checkpointed:
        checkpoint_activations(network)
    compile_network(network, backend=keep, fullgraph=True)  # where a graph would break, this raises
    assert torch.allclose(gradients(plain), gradients(network), atol=1e-6)
    assert len(compiled) == 2  # the text's and the UNet's


# -- training ------------------------------------------------------------------------------------------------


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
        trainer = object.__new__(BigTrainer)
        trainer.config, trainer.step, trainer.rank, trainer.world = Config(seed=3), step, rank, 2
        trainer.seed_step()
        return torch.rand(3).tolist()

    assert drawn(0, 5) == drawn(0, 5)
    assert len({tuple(drawn(rank, step)) for rank in (0, 1) for step in (5, 6)}) == 4


def test_the_logged_loss_is_the_mean_over_all_images():
    settings = {"learning_rate": 0.0, "optimizer": "adamw", "device": "cpu", "precision": "fp32"}
    config = Config(batch_size=2, grad_accum=3, **settings)
    trainer = BigTrainer(small_network(), at_given_t, Noised(), config, None, None, {}, None)
    row = trainer.train_step(0.0)
    with torch.no_grad():
        each = at_given_t(trainer.network, *Noised().batch(batch_indices(0, 40, 6, 0)))
    assert row["loss"] == pytest.approx(each.mean().item(), rel=1e-4)


def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(tmp_path):
    from tests.two_processes import gradients

    torchrun("-m", "tests.two_processes", tmp_path, cwd=ROOT)
    assert close(gradients(16, 1), torch.load(tmp_path / "gradients.pt"))


@pytest.fixture
def tiny_data(tmp_path):
    from tests.test_lesson_06_data import picture, sidecar

    for i in range(12):
        sidecar(tmp_path / "data", f"{i:02}.png", picture(i), f"number {i}")
    return tmp_path


TRAIN = str(ROOT / "lesson_06_miniglide" / "train.py")
FEW = [
    "--data-dir",
    "data",
    "--num-channels",
    "24",
    "--num-head-channels",
    "8",
    "--xf-layers",
    "1",
    "--caption",
    "a",
]
FEW += ["--batch-size", "2", "--steps", "4", "--checkpoint-every", "2", "--device", "cpu"]


def train(folder, *flags):
    done = subprocess.run([sys.executable, TRAIN, *flags], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 2), done.stderr
    return done


def test_two_processes_write_one_run_and_resume_it(tiny_data):
    said = torchrun(TRAIN, *FEW, "--out", "whole", cwd=tiny_data)
    assert said.count("run: whole") == 2  # first and last, of one process
    whole = final_state(tiny_data / "whole")
    for ending in ("pt", "safetensors"):
        (tiny_data / "whole" / "checkpoints" / f"step_0000004.{ending}").unlink()
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


def test_a_resume_that_does_not_fit_leaves_the_run_as_it_was(tiny_data):
    assert train(tiny_data, *FEW, "--out", "run").returncode == 0
    config = (tiny_data / "run" / "config.json").read_text()
    for flags, said in {
        ("--timesteps", "500"): "--timesteps was 1000 and cannot change",
        ("--num-channels", "48"): "--num-channels was 24 and cannot change",
        ("--out", "elsewhere"): "goes on in that folder; leave out --out elsewhere",
        ("--image-limit", "5"): "trained on data, 11 images, now finds data, 4 images",
    }.items():
        done = train(tiny_data, "--resume", "run", *flags)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert (tiny_data / "run" / "config.json").read_text() == config
    assert not (tiny_data / "elsewhere").exists()


def test_defaults_are_the_original_whatever_else_is_given():
    config = resolved(Config(defaults=True, num_channels=64, xf_layers=2, batch_size=99))
    network, text = settings_of(config)
    assert (network.num_channels, text.layers, config.batch_size, config.timesteps) == (96, 16, 8, 100)


def test_a_preset_has_its_own_rate_and_batch():
    def of(**flags):
        config = resolved(Config(**flags))
        return config.learning_rate, config.batch_size, config.optimizer

    assert (of(), of(preset="glide")) == ((6e-3, 128, "muon"), (1e-4, 32, "adamw"))
    assert of(learning_rate=1e-3, batch_size=7, optimizer="adamw") == (1e-3, 7, "adamw")


def run_small(tmp_path, **settings):
    config = resolved(Config(out=str(tmp_path / "run"), device="cpu", batch_size=2, **settings))
    run = Run("lesson_06_miniglide", config, "x", keep=None)
    trainer = BigTrainer(small_network(), at_given_t, Noised(), config, run, None, {}, None)
    trainer.train()
    return sorted(path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*.pt"))


def test_delcheck_keeps_the_newest_three_checkpoints(tiny_data):
    for flags, kept in (([], (1, 2, 3, 4, 5)), (["--delcheck"], (3, 4, 5))):
        out = f"run{len(flags)}"
        train(tiny_data, *FEW, "--steps", "5", "--checkpoint-every", "1", "--out", out, *flags)
        there = sorted(path.name for path in (tiny_data / out / "checkpoints").glob("step_*.pt"))
        assert there == [f"step_{i:07}.pt" for i in kept]


def test_the_flags_of_large_networks(tiny_data):
    flags = ["--grad-accum", "2", "--activation-checkpointing", "--precision", "bf16", "--batch-size", "1"]
    flags += ["--sample-every", "2", "--validation-fraction", "0.5"]
    assert train(tiny_data, *FEW, "--out", "run", *flags).returncode == 0
    assert len(list((tiny_data / "run" / "samples").glob("*.png"))) == 2
    numbers = read_json(tiny_data / "run" / "metrics.json")
    assert (numbers["images"], numbers["captions_cut"]) == (6, 0)


def test_a_loss_is_drawn_beside_that_of_the_same_kind_of_run():
    results = ROOT / "lesson_06_miniglide" / "results"
    assert shipped_curve(Config()) == results / "metrics.csv"
    assert shipped_curve(Config(data_dir="photos", dogs=True)) == results / "dogs" / "metrics.csv"
    for other in ({"data_dir": "photos"}, {"preset": "tiny_small"}, {"no_vlb": True}):
        assert shipped_curve(Config(**other)) is None


def test_captions_are_dropped_by_default():
    assert Config().drop_caption == 0.2


def test_what_reads_captions_comes_with_the_weights_to_start_from(tiny_data):
    layers = FEW.index("--xf-layers")
    few = FEW[:layers] + FEW[layers + 2 :]
    assert train(tiny_data, *few, "--out", "first").returncode == 0
    for flag in ("--text-encoder", "--vocabulary"):
        done = train(tiny_data, *few, "--start-from", "first", flag, "x", "--out", "second")
        assert done.returncode == 2 and "leave out --text-encoder" in done.stderr
    done = train(tiny_data, *FEW, "--text-encoder", "x", "--out", "second")
    assert done.returncode == 2 and "--xf-layers and --xf-heads do nothing" in done.stderr
    assert not (tiny_data / "second").exists()


def test_checkpoints_by_the_clock(tmp_path):
    assert len(run_small(tmp_path / "often", steps=3, checkpoint_time=1e-6)) == 3
    assert len(run_small(tmp_path / "seldom", steps=3, checkpoint_time=1e6)) == 1  # the last


def test_a_process_that_writes_nothing_knows_when_a_checkpoint_was(tmp_path):
    """Otherwise it would compute the validation loss after every step, and all others would wait for it."""
    config = resolved(Config(device="cpu", batch_size=2, checkpoint_time=600))
    trainer = BigTrainer(small_network(), at_given_t, Noised(), config, None, None, {}, None, rank=1)
    due = []
    for trainer.minutes in (1, 9, 10, 11, 19, 20):
        due.append(trainer.checkpoint_is_due())
        if due[-1]:
            trainer.validation_loss()
    assert due == [False, False, True, False, False, True]


def test_the_samples_need_only_the_checkpoint(tiny_data):
    done = subprocess.run(
        [
            sys.executable,
            TRAIN,
            *FEW,
            "--epochs",
            "1",
            "--steps",
            "99",
            "--no-vlb",
            "--timesteps",
            "10",
            "--out",
            "r",
        ],
        cwd=tiny_data,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    _, facts = load_weights(tiny_data / "r", "lesson_06_miniglide")
    assert facts["step"] == 6  # 11 images (one is held back) in batches of 2, once
    assert facts["config"]["timesteps"] == 10 and "--no-vlb" in facts["command"]
    assert read_json(tiny_data / "r" / "metrics.json")["images"] == 11
    sample = [
        sys.executable,
        str(ROOT / "lesson_06_miniglide" / "sample.py"),
        "--checkpoint",
        "r",
        "--steps",
        "3",
    ]
    done = subprocess.run([*sample, "--prompt", "number 3"], cwd=tiny_data, capture_output=True, text=True)
    assert done.returncode == 0 and (tiny_data / "samples.png").exists(), done.stderr
