"""What lesson_06_miniglide/ERRATA.md says and no other test holds."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common.cli import run_command
from common.training.trainer import Trainer
from lesson_01_ddpm.diffusion import ddpm_sample, training_loss
from lesson_02_improved_ddpm.variational_bound import learned_range_or_fixed_small
from lesson_04_text_conditioning.text_transformer import TextEncoding
from lesson_04_text_conditioning.velocity import loss_simple_velocity
from lesson_05_cfg.guidance import caption_loss, drop_captions
from lesson_06_miniglide.image_data.captioned_images import load_images, make_shapes
from lesson_06_miniglide.model import build_model, build_network, make_diffusion, resolve_configs
from lesson_06_miniglide.networks.presets import PRESETS
from lesson_06_miniglide.train import main
from lesson_06_miniglide.training.config import Config, resolved
from tests.conftest import ROOT

TINY = PRESETS["tiny"]


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "lesson_06_miniglide" / "ERRATA.md").read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in written]


def test_image_limit_is_not_for_dogs(tmp_path, capsys):
    for breed in ("n00000001-one", "n00000002-two"):
        folder = tmp_path / "Images" / breed
        folder.mkdir(parents=True)
        for i in range(3):
            pixels = np.random.RandomState(i).randint(0, 256, (30, 40, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{i}.jpg")
    flags = {"cache_dir": None, "resize": "squish", "allow_broken": False, "flip": True}
    for data_dir in (f"{tmp_path}", f"{tmp_path}/"):  # with a slash at the end or without
        flags["data_dir"] = data_dir
        assert len(load_images(SimpleNamespace(dogs=True, image_limit=2, **flags))) == 6
        assert "--image-limit does not apply to --dogs" in capsys.readouterr().out
        assert len(load_images(SimpleNamespace(dogs=False, image_limit=2, **flags))) == 2


def test_captions_are_dropped_in_training():
    seen = []

    class Network(torch.nn.Module):
        image_shape = (3, 2, 2)

        def encode_text(self, tokens, mask):
            seen.append(mask)
            return TextEncoding(torch.zeros(len(mask), 4), torch.zeros(len(mask), 4, 4))

        def forward(self, x_t, t, text):
            return torch.zeros(len(x_t), 6, *x_t.shape[2:])

    drop = partial(drop_captions, probability=0.2)
    loss = caption_loss(PRESETS["report"].losses[0], make_diffusion(TINY, 100), drop)
    x_0, mask = torch.linspace(-1, 1, 2000)[:, None, None, None].expand(-1, 3, 2, 2), torch.ones(2000, 4) > 0
    loss(Network(), x_0, mask.long(), mask)
    assert abs((~seen[0].any(1)).float().mean() - 0.2) < 0.05


def test_the_bound_teaches_the_variance_of_every_preset():
    for preset in PRESETS.values():
        hybrid, simple = preset.losses
        diffusion, torch_seed = make_diffusion(TINY, 100), torch.manual_seed(0)
        x_0, noise = torch.rand(4, 3, 4, 4) * 2 - 1, torch.randn(4, 3, 4, 4, generator=torch_seed)
        t, v = torch.tensor([0, 3, 50, 99]), torch.zeros(4, 3, 4, 4, requires_grad=True)
        output = torch.cat([noise + 0.1, v], 1)
        hybrid(diffusion, lambda x_t, t, output=output: output, x_0, t, noise).sum().backward()
        assert (v.grad.flatten(1).abs().sum(1) > 0).all()
        with torch.no_grad():
            bound = [
                f(diffusion, lambda x_t, t, output=output: output, x_0, t, noise) for f in (hybrid, simple)
            ]
        one_term = (bound[0] - bound[1])[2]
        assert one_term > 0  # T / 1000 = 0.1 of the term in bits: its size is held by the golden values


def test_every_timestep_is_trained():
    seen = set()

    def loss(diffusion, denoiser, x_0, t, noise):
        seen.update(t.tolist())
        return torch.zeros(len(t))

    def predict_nothing(x_t, t):
        raise AssertionError("the loss above does not ask")

    training_loss(loss, make_diffusion(TINY, 50), predict_nothing, torch.linspace(-1, 1, 2000)[:, None])
    assert seen == set(range(50))


def test_no_vlb_learns_no_variance():
    config = Config(no_vlb=True, num_channels=24, num_head_channels=8, caption_dropout=0.0)
    network_config, text_config = resolve_configs(config)
    text_config = replace(text_config, vocab_size=300)
    network, diffusion, _ = build_model("tiny", network_config, text_config, timesteps=100)
    tokens = torch.zeros(2, text_config.context_length).long()
    mask = torch.ones_like(tokens).bool()
    loss = caption_loss(loss_simple_velocity, diffusion, lambda mask: mask)
    assert loss(network, torch.rand(2, 3, 64, 64) * 2 - 1, tokens, mask).shape == (2,)
    text = network.encode_text(tokens, mask)
    x_T = torch.randn(2, 3, 64, 64)
    assert network(x_T, torch.tensor([3, 99]), text).shape == x_T.shape
    few, log_variance_fn = diffusion.respace_evenly(2), learned_range_or_fixed_small
    *_, last = ddpm_sample(few, lambda x, t: network(x, t, text), x_T, log_variance_fn=log_variance_fn)
    assert last.x_prev.isfinite().all()


def test_help_names_the_flags_of_the_original(capsys):
    with pytest.raises(SystemExit):
        run_command(main, Config, argv=["--help"])
    said = capsys.readouterr().out
    flags = "data-dir image-limit dogs checkpoint-dir checkpoint-time continue-train num-channels defaults "
    flags += "num-head-channels num-res-block xf-width xf-layers xf-heads epochs batch-size timesteps "
    flags += "learning-rate caption delcheck no-vlb"
    assert not [flag for flag in flags.split() if f"--{flag}" not in said]
    config = Config()
    assert f"(default: {config.batch_size})" in said and f"(default: {config.timesteps})" in said


def test_the_optimizer_is_adamw():
    network = torch.nn.Linear(2, 2)
    config = resolved(Config(preset="report", device="cpu"))
    optimizer = Trainer(network, lambda network: torch.zeros(1), make_shapes(1), config).optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] > 0


def test_kernels_are_not_waited_for():
    files = [*ROOT.glob("common/**/*.py"), *ROOT.glob("lesson_*/**/*.py"), ROOT / ".ci" / "run"]
    assert not [file for file in files if "CUDA_LAUNCH_BLOCKING" in file.read_text(encoding="utf-8")]


def test_heads_cost_no_parameters():
    report = PRESETS["report"]
    network, text = report.network, report.text

    def count(network, text):
        with torch.device("meta"):
            return sum(p.numel() for p in build_network(report, network, text, torch.ones(1)).parameters())

    whole = count(network, text)
    assert count(replace(network, num_head_channels=96), text) == whole
    assert count(network, replace(text, heads=2)) == whole
    assert count(replace(network, num_channels=192), text) > 2 * whole
