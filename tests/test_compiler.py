"""--compile: without a compiler one line, before anything is written; with one, the same training."""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from common import device
from common.cli import run_command
from common.errors import UserError
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_06_miniglide import train
from lesson_06_miniglide.benchmarks import speed
from lesson_06_miniglide.training.config import Config, resolved
from lesson_06_miniglide.training.distributed import DDPTrainer
from tests.conftest import ROOT
from tests.test_lesson_06_training import SMALL, SMALL_TEXT, fill_zeros, loss_at_given_t

CHECK = """
from common.device import check_compiler
from common.errors import UserError
try:
    check_compiler("cpu")
except UserError as error:
    print(error)
"""


@pytest.mark.slow
def test_a_missing_compiler_is_named_in_one_line(tmp_path):
    environment = os.environ | {"CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", CHECK]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == 1 and "no-such-compiler" in done.stdout
    assert "apt-get install g++" in done.stdout and "leave out --compile" in done.stdout


def test_whatever_the_compiler_says_becomes_one_line(monkeypatch):
    class Failure(Exception):
        inner_exception = RuntimeError("two\nlines " + 1000 * "x")

    def fail(x):
        raise Failure("advice for debugging")

    monkeypatch.setattr(device.torch, "compile", lambda function: fail)
    with pytest.raises(UserError, match=r"RuntimeError: two lines x.*leave out --compile") as caught:
        device.check_compiler("cpu")
    assert (
        "\n" not in str(caught.value) and "advice" not in str(caught.value) and len(str(caught.value)) < 500
    )


@pytest.mark.parametrize("module, flags", [(train, ["--data-dir", "missing"]), (speed, ["lesson_03"])])
def test_commands_check_the_compiler_first(module, flags, monkeypatch, capsys, tmp_path):
    def no_compiler(name):
        raise UserError(f"no compiler for {name}")

    monkeypatch.setattr(module, "check_compiler", no_compiler)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        run_command(module.main, module.Config, argv=[*flags, "--compile", "--device", "cpu"])
    assert capsys.readouterr().err == "error: no compiler for cpu\n"
    assert not list(tmp_path.iterdir())


# -- compiled training ---------------------------------------------------------------------------------------

# As small as a network with every kind of layer can be: each kernel takes the compiler seconds.
SMALLEST = replace(SMALL, image_size=16, patch_size=1, channel_mult=(1,), attention_resolutions=())
STEPS = 50


class SmallImages:
    """Images that come with their own t and noise, as in test_lesson_06_training.Noised."""

    name = "small"

    def __len__(self):
        return 40

    def batch(self, indices):
        x_0, noise = torch.randn(2, 40, 3, 16, 16, generator=torch.Generator().manual_seed(0))[:, indices]
        return x_0.clamp(-1, 1), indices * 20, noise, indices[:, None].expand(-1, 4)


def trained(precision, compiled):
    """Return the losses [steps] of a short training run, and each parameter's gradients [steps, ...]."""
    torch.manual_seed(0)
    settings = {"device": "cpu", "batch_size": 4, "optimizer": "adamw", "learning_rate": 2e-3}
    config = resolved(Config(precision=precision, compile=compiled, **settings))
    network = fill_zeros(TextUNet(SMALLEST, SMALL_TEXT))
    trainer = DDPTrainer(network, loss_at_given_t, SmallImages(), config)
    losses, gradients = [], []
    for _ in range(STEPS):
        losses.append(trainer.train_step(0.0)["loss"])
        gradients.append([p.grad.clone() for p in trainer.network.parameters()])
    return torch.tensor(losses), [torch.stack(steps) for steps in zip(*gradients)]


def distances(gradients, reference):
    """Return for each parameter how far its gradients are from the reference, relative to the reference.

    NaN where the reference is only rounding: biases before GroupNorm have no effect.
    """
    sizes = torch.stack([steps.norm() for steps in reference])
    apart = torch.stack([(a - b).norm() for a, b in zip(gradients, reference)]) / sizes
    return apart.where(sizes > 1e-4 * sizes.max(), torch.nan)


@pytest.fixture
def compiler(no_type_checks):
    try:
        device.check_compiler("cpu")
    except UserError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_compiled_and_eager_training_stay_together(compiler):
    """In fp32 up to the order of additions; in bf16 no farther apart than bf16's own rounding takes them.

    glide-finetune warned of subtly wrong gradients of compiled networks in bf16.
    """
    eager = {precision: trained(precision, False) for precision in ("fp32", "bf16")}
    rounding = distances(eager["bf16"][1], eager["fp32"][1])
    has_effect = ~rounding.isnan()
    assert has_effect.sum() > 60 and rounding[has_effect].max() < 0.1
    for precision, most in (("fp32", torch.tensor(1e-4)), ("bf16", 2 * rounding)):
        (losses, gradients), (compiled_losses, compiled_gradients) = (
            eager[precision],
            trained(precision, True),
        )
        apart = distances(compiled_gradients, gradients)
        assert losses[-1] < 0.8 * losses[0]
        torch.testing.assert_close(compiled_losses, losses, rtol=2e-3, atol=0)
        assert (apart < most)[has_effect].all()
