"""Nothing stays behind on the CPU: the maths on a device that is not there, whose tensors have no numbers."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.classifier import Classifier
from lesson_01_ddpm import diffusion as ddpm
from lesson_02_improved_ddpm import ddim
from lesson_02_improved_ddpm import variational_bound as bound
from lesson_03_adm.classifier_guidance import guide_mean, guide_noise
from lesson_04_text_conditioning import velocity
from lesson_05_cfg.dpm_solver import dpm_solver_sample
from lesson_06_miniglide.editing import inpaint_sample

WHOLE = ddpm.GaussianDiffusion(ddpm.linear_betas(100))
FEW = WHOLE.evenly(4)


def denoiser(x_t, t):
    return torch.cat([x_t, x_t], 1)


def finished(sampler, **settings):
    """x: its finished samples."""
    return lambda x: list(sampler(FEW, denoiser, x, **settings))[-1].x_prev


def loss_of(loss):
    return lambda x: loss(FEW, denoiser, x, torch.arange(4), torch.zeros_like(x))


def inpainted(x):
    """The picture and its mask come from files, so they are on the CPU."""
    kept = {"image": torch.zeros(1, 1, 8, 8), "known": torch.zeros(1, 1, 8, 8)}
    return finished(inpaint_sample, times=2, **kept)(x)


MATHS = {
    "L_simple": loss_of(ddpm.loss_simple),
    "L_hybrid": loss_of(bound.loss_hybrid),
    "L_vlb": loss_of(bound.loss_vlb),
    "velocity": loss_of(velocity.loss_velocity),
    "prior": partial(bound.prior_bits, FEW),
    "the bound": lambda x: bound.variational_bound(FEW, denoiser, x).total_bits,
    "ancestral": finished(ddpm.ddpm_sample, log_variance=bound.learned_range),
    "DDIM": finished(ddim.ddim_sample),
    "inversion": partial(ddim.ddim_invert, FEW, denoiser),
    "slerp": lambda x: ddim.slerp(x[0], x[1], torch.linspace(0, 1, 3)),
    "guided mean": finished(ddpm.ddpm_sample, guide=guide_mean(lambda x_t, t: x_t)),
    "guided noise": lambda x: (
        list(ddim.ddim_sample(FEW, guide_noise(WHOLE, denoiser, lambda x_t, t: x_t), x, bound=None))[
            -1
        ].x_prev
    ),
}
READING_TABLES = {"DPM-Solver++": finished(dpm_solver_sample), "inpainting": inpainted}  # with .item()


@pytest.mark.parametrize("name", MATHS)
def test_maths_stays_on_the_device_of_the_images(name, monkeypatch):
    for module in (ddpm, bound, velocity):
        monkeypatch.setattr(module, "check_range", lambda x_0: None)  # looks at numbers
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert MATHS[name](torch.zeros(4, 1, 8, 8, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("name", READING_TABLES)
def test_samplers_that_read_tables_do_so_too(name):
    assert READING_TABLES[name](torch.zeros(4, 1, 8, 8, device="meta")).device.type == "meta"


def test_a_classifier_on_a_gpu_reads_twice():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        classifier = Classifier().eval()
        for _ in range(2):
            features, probabilities = classifier.read(torch.zeros(4, 1, 32, 32, device="cpu"))
            assert features.device.type == probabilities.device.type == "cpu"
