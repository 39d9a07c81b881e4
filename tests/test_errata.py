"""What lesson_06_miniglide/ERRATA.md says and no other test holds."""

import re
from dataclasses import replace
from types import SimpleNamespace

import torch

from lesson_01_ddpm.diffusion import ddpm_sample, loss_at_random_t
from lesson_02_improved_ddpm.variational_bound import learned_or_small
from lesson_06_miniglide.captioned_images import load_images
from lesson_06_miniglide.presets import PRESETS, new_diffusion, new_network, settings_of
from lesson_06_miniglide.train import Config, new_loss
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
    flags = {"cache_dir": None, "resize": "squish", "allow_broken": False, "data_dir": str(tmp_path)}
    assert len(load_images(SimpleNamespace(dogs=True, image_limit=2, **flags))) == 6
    assert "--image-limit is not for --dogs" in capsys.readouterr().out
    assert len(load_images(SimpleNamespace(dogs=False, image_limit=2, **flags))) == 2


def test_every_timestep_is_trained():
    seen = set()

    def loss(diffusion, denoiser, x_0, t, noise):
        seen.update(t.tolist())
        return torch.zeros(len(t))

    loss_at_random_t(loss, new_diffusion(50), None, torch.linspace(-1, 1, 2000)[:, None])
    assert seen == set(range(50))


def test_no_vlb_learns_no_variance():
    config = Config(no_vlb=True, num_channels=8, num_head_channels=8, drop_caption=0.0)
    network_settings, text = settings_of(config)
    diffusion = new_diffusion(100)
    network = new_network("tiny", network_settings, replace(text, vocab_size=300), diffusion.alpha_bar)
    tokens, mask = torch.zeros(2, text.context).long(), torch.ones(2, text.context).bool()
    loss = new_loss(config, diffusion)
    assert loss(network, torch.rand(2, 3, 64, 64) * 2 - 1, tokens, mask).shape == (2,)
    text = network.encode_text(tokens, mask)
    x_T = torch.randn(2, 3, 64, 64)
    assert network(x_T, torch.tensor([3, 99]), text).shape == x_T.shape
    few = diffusion.evenly(2)
    *_, last = ddpm_sample(few, lambda x, t: network(x, t, text), x_T, log_variance=learned_or_small)
    assert last.x_prev.isfinite().all()


def test_heads_cost_no_parameters():
    _, network, text = PRESETS["report"]

    def count(network, text):
        with torch.device("meta"):
            return sum(p.numel() for p in new_network("report", network, text, torch.ones(1)).parameters())

    whole = count(network, text)
    assert count(replace(network, num_head_channels=96), text) == whole
    assert count(network, replace(text, heads=2)) == whole
    assert count(replace(network, num_channels=192), text) > 2 * whole
