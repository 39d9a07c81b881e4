"""What lesson_06_miniglide/ERRATA.md says and no other test holds."""

import re
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from common.command import run_command
from common.training import Trainer
from lesson_01_ddpm.diffusion import ddpm_sample, loss_at_random_t
from lesson_02_improved_ddpm.variational_bound import learned_or_small
from lesson_04_text_conditioning.velocity import loss_velocity_simple
from lesson_05_cfg.guidance import drop_captions, loss_of_captions
from lesson_06_miniglide.captioned_images import load_images
from lesson_06_miniglide.presets import PRESETS, new_diffusion, new_network, settings_of
from lesson_06_miniglide.train import Config, main, resolved
from tests.conftest import ROOT
from tests.test_lesson_06_data import picture, save


def test_every_test_that_is_named_exists():
    named = set(re.findall(r"`(test_\w+)`", (ROOT / "lesson_06_miniglide" / "ERRATA.md").read_text()))
    written = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    assert len(named) > 15
    assert not [name for name in named if f"def {name}(" not in written]


def test_image_limit_is_not_for_dogs(tmp_path, capsys):
    for breed in ("n00000001-one", "n00000002-two"):
        for i in range(3):
            save(picture(i), tmp_path / "Images" / breed / f"{i}.jpg")
    flags = {"cache_dir": None, "resize": "squish", "allow_broken": False, "flip": True}
    for data_dir in (f"{tmp_path}", f"{tmp_path}/"):  # with a slash at the end or without
        flags["data_dir"] = data_dir
        assert len(load_images(SimpleNamespace(dogs=True, image_limit=2, **flags))) == 6
        assert "--image-limit is not for --dogs" in capsys.readouterr().out
        assert len(load_images(SimpleNamespace(dogs=False, image_limit=2, **flags))) == 2


def test_captions_are_dropped_in_training():
    seen = []

    class Network:
        def encode_text(self, tokens, mask):
            seen.append(mask)
            return "text"

        def __call__(self, x_t, t, text):
            return torch.zeros(len(x_t), 6, *x_t.shape[2:])

    drop = partial(drop_captions, probability=0.2)
    loss = loss_of_captions(PRESETS["report"].losses[0], new_diffusion(100), drop)
    x_0, mask = torch.linspace(-1, 1, 2000)[:, None, None, None].expand(-1, 3, 2, 2), torch.ones(2000, 4) > 0
    loss(Network(), x_0, mask.long(), mask)
    assert abs((~seen[0].any(1)).float().mean() - 0.2) < 0.05


def test_the_bound_teaches_the_variance_of_every_preset():
    for preset in PRESETS.values():
        hybrid, simple = preset.losses
        diffusion, torch_seed = new_diffusion(100), torch.manual_seed(0)
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

    loss_at_random_t(loss, new_diffusion(50), None, torch.linspace(-1, 1, 2000)[:, None])
    assert seen == set(range(50))


def test_no_vlb_learns_no_variance():
    config = Config(no_vlb=True, num_channels=24, num_head_channels=8, drop_caption=0.0)
    network_settings, text = settings_of(config)
    diffusion = new_diffusion(100)
    network = new_network("tiny", network_settings, replace(text, vocab_size=300), diffusion.alpha_bar)
    tokens, mask = torch.zeros(2, text.context).long(), torch.ones(2, text.context).bool()
    loss = loss_of_captions(loss_velocity_simple, diffusion, lambda mask: mask)
    assert loss(network, torch.rand(2, 3, 64, 64) * 2 - 1, tokens, mask).shape == (2,)
    text = network.encode_text(tokens, mask)
    x_T = torch.randn(2, 3, 64, 64)
    assert network(x_T, torch.tensor([3, 99]), text).shape == x_T.shape
    few = diffusion.evenly(2)
    *_, last = ddpm_sample(few, lambda x, t: network(x, t, text), x_T, log_variance=learned_or_small)
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


def test_the_optimiser_is_adamw():
    network = torch.nn.Linear(2, 2)
    config = resolved(Config(preset="report", device="cpu"))
    optimizer = Trainer(network, None, None, config, None, None, {}, None).optimizer
    assert type(optimizer) is torch.optim.AdamW and optimizer.defaults["weight_decay"] > 0


def test_kernels_are_not_waited_for():
    files = [*ROOT.glob("common/*.py"), *ROOT.glob("lesson_*/*.py"), ROOT / ".ci" / "run"]
    assert not [file for file in files if "CUDA_LAUNCH_BLOCKING" in file.read_text(encoding="utf-8")]


def test_heads_cost_no_parameters():
    network, text, *_ = PRESETS["report"]

    def count(network, text):
        with torch.device("meta"):
            return sum(p.numel() for p in new_network("report", network, text, torch.ones(1)).parameters())

    whole = count(network, text)
    assert count(replace(network, num_head_channels=96), text) == whole
    assert count(network, replace(text, heads=2)) == whole
    assert count(replace(network, num_channels=192), text) > 2 * whole
