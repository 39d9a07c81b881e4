"""Results are on the device of the images, checked on fake devices whose tensors have no values."""

from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from common.digits.classifier import DigitClassifier
from common.sampling import last_sample
from lesson_01_ddpm import diffusion as ddpm
from lesson_02_improved_ddpm import ddim
from lesson_02_improved_ddpm import variational_bound as bound
from lesson_03_adm.classifier_guidance import condition_mean, condition_score
from lesson_04_text_conditioning import velocity
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample
from lesson_06_miniglide.editing.samplers import repaint_sample

WHOLE = ddpm.GaussianDiffusion(ddpm.linear_betas(100))
FEW = WHOLE.respace_evenly(4)


def denoiser(x_t, t):
    return torch.cat([x_t, x_t], 1)


def samples_of(sampler, **kwargs):
    """Return a function x_T -> samples."""
    return lambda x_T: last_sample(sampler(FEW, denoiser, x_T, **kwargs))


def loss_of(loss):
    return lambda x: loss(FEW, denoiser, x, torch.arange(4), torch.zeros_like(x))


def inpainted(x):
    """Return inpainted samples; image and mask are on the CPU, because they come from files."""
    given = {"image": torch.zeros(1, 1, 8, 8), "keep_mask": torch.zeros(1, 1, 8, 8)}
    return samples_of(repaint_sample, num_resamples=2, **given)(x)


MATHS = {
    "L_simple": loss_of(ddpm.loss_simple),
    "L_hybrid": loss_of(bound.loss_hybrid),
    "L_vlb": loss_of(bound.loss_vlb),
    "velocity": loss_of(velocity.loss_hybrid_velocity),
    "prior": partial(bound.prior_bpd, FEW),
    "VLB": lambda x: bound.variational_bound(FEW, denoiser, x).total_bpd,
    "ancestral": samples_of(ddpm.ddpm_sample, log_variance_fn=bound.learned_range),
    "DDIM": samples_of(ddim.ddim_sample),
    "inversion": partial(ddim.ddim_invert, FEW, denoiser),
    "slerp": lambda x: ddim.slerp(x[0], x[1], torch.linspace(0, 1, 3)),
    "guided mean": samples_of(ddpm.ddpm_sample, mean_fn=condition_mean(lambda x_t, t: x_t)),
    "guided noise": lambda x: last_sample(
        ddim.ddim_sample(FEW, condition_score(WHOLE, denoiser, lambda x_t, t: x_t), x, denoised_fn=None)
    ),
}
READING_TABLES = {"DPM-Solver++": samples_of(dpmpp_2m_sample), "inpainting": inpainted}  # with .item()


@pytest.mark.parametrize("name", MATHS)
def test_maths_stays_on_the_device_of_the_images(name, monkeypatch):
    for module in (ddpm, bound, velocity):
        monkeypatch.setattr(module, "check_range", lambda x_0: None)  # reads values
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert MATHS[name](torch.zeros(4, 1, 8, 8, device="cuda")).device.type == "cuda"


@pytest.mark.parametrize("name", READING_TABLES)
def test_samplers_that_read_tables_do_so_too(name):
    assert READING_TABLES[name](torch.zeros(4, 1, 8, 8, device="meta")).device.type == "meta"


def test_a_classifier_on_a_gpu_predicts_twice():
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        classifier = DigitClassifier().eval()
        for _ in range(2):
            features, probabilities = classifier.predict(torch.zeros(4, 1, 32, 32, device="cpu"))
            assert features.device.type == probabilities.device.type == "cpu"
