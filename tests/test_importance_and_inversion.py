"""Lesson 2: importance sampling of t, the VLB of a data set, DDIM inversion, interpolation."""

import pytest
import torch
from torch import nn

from common.images import to_float
from lesson_01_ddpm.diffusion import GaussianDiffusion, fixed_large, fixed_small
from lesson_02_improved_ddpm.ddim import ddim_invert, ddim_sample, slerp
from lesson_02_improved_ddpm.importance_sampling import ImportanceSampledLoss
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_02_improved_ddpm.variational_bound import bits_per_dim, loss_vlb, variational_bound, vb_terms_bpd
from tests.test_training import assert_same, final_state, run_line

NUM_TIMESTEPS = 20


@pytest.fixture
def diffusion():
    return GaussianDiffusion(cosine_betas(NUM_TIMESTEPS))


class KnownLoss:
    """A loss of (t + 1)^2 with a bit of noise for every image."""

    def __init__(self):
        self.drawn = []

    def __call__(self, diffusion, denoiser, x_0, t, noise):
        self.drawn.append(t)
        return (t + 1.0) ** 2 + 0.1 * noise.flatten(1)[:, 0]


def warm(diffusion, **settings):
    torch.manual_seed(0)
    loss = ImportanceSampledLoss(KnownLoss(), diffusion, **settings)
    while loss.counts.min() < loss.losses.shape[1]:
        loss(None, torch.zeros(500, 1, 1, 1))
    loss.loss.drawn.clear()
    return loss


def test_t_is_drawn_in_proportion_to_the_root_of_the_second_moment(diffusion):
    loss = warm(diffusion)
    wanted = (torch.arange(NUM_TIMESTEPS) + 1.0).double() ** 2
    for _ in range(20):
        loss(None, torch.zeros(5000, 1, 1, 1))
    share = torch.cat(loss.loss.drawn).bincount(minlength=NUM_TIMESTEPS) / 100_000
    torch.testing.assert_close(share.double(), wanted / wanted.sum(), rtol=0.05, atol=2e-3)


def test_importance_sampling_changes_the_noise_of_the_mean_but_not_the_mean(diffusion):
    loss = warm(diffusion)
    exact = ((torch.arange(NUM_TIMESTEPS) + 1.0) ** 2).mean().item()
    weighted = torch.cat([loss(None, torch.zeros(5000, 1, 1, 1)) for _ in range(4)])
    with torch.no_grad():
        uniform = loss(None, torch.zeros(20_000, 1, 1, 1))
    assert weighted.mean().item() == pytest.approx(exact, rel=0.01)
    assert uniform.mean().item() == pytest.approx(exact, rel=0.05)
    assert weighted.std() < uniform.std() / 5


def test_t_is_uniform_until_the_history_is_full_and_in_validation(diffusion):
    loss = ImportanceSampledLoss(KnownLoss(), diffusion)
    torch.testing.assert_close(loss.probabilities(), torch.full_like(loss.probabilities(), 1 / NUM_TIMESTEPS))
    with torch.no_grad():
        loss(None, torch.zeros(5000, 1, 1, 1))
    assert loss.counts.sum() == 0  # a validation loss leaves no trace
    share = torch.cat(loss.loss.drawn).bincount(minlength=NUM_TIMESTEPS) / 5000
    torch.testing.assert_close(share, torch.full_like(share, 1 / NUM_TIMESTEPS), rtol=0.25, atol=0)


def test_the_history_holds_the_last_ten(diffusion):
    loss = ImportanceSampledLoss(KnownLoss(), diffusion)
    loss.update_history(torch.zeros(13, dtype=torch.int64), torch.arange(13.0))
    assert sorted(loss.losses[0].tolist()) == [float(i) for i in range(3, 13)]


class StatefulLoss(nn.Module):
    """A loss whose value depends on all batches before."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, network, x, y):
        if torch.is_grad_enabled():
            self.seen += x.sum()
        return (network(x) - y - self.seen / 1000).square().mean(1)


def test_a_stateful_loss_is_resumed_bit_for_bit(tmp_path):
    run_line(tmp_path / "whole", StatefulLoss(), steps=40, checkpoint_every=20)
    run_line(tmp_path / "cut", StatefulLoss(), steps=20, checkpoint_every=20)
    halfway = final_state(tmp_path / "cut" / "run")
    assert halfway["loss"]["seen"] > 0
    # The same schedule, interrupted: the first half of the whole run, continued with a fresh loss.
    whole = tmp_path / "whole" / "run"
    end = final_state(whole)
    for file in (whole / "checkpoints").glob("step_0000040.*"):
        file.unlink()
    run_line(tmp_path / "whole", StatefulLoss(), steps=40, checkpoint_every=20, resume=str(whole), out=None)
    assert_same(final_state(whole), end)


# -- the VLB of a data set ------------------------


def gaussian_denoiser(process, mean=0.3, std=0.2):
    """Return the exact denoiser of data whose values are independent N(mean, std^2)."""

    def denoiser(x_t, t):
        a = process.alpha_bar[t].view(-1, 1, 1, 1)
        return ((1 - a).sqrt() * (x_t - a.sqrt() * mean) / (a * std**2 + 1 - a)).float()

    return denoiser


@pytest.mark.parametrize("log_variance", [fixed_small, fixed_large])
def test_the_estimate_of_the_vlb_agrees_with_the_sum(diffusion, log_variance):
    generator = torch.Generator().manual_seed(0)
    x = (0.3 + 0.2 * torch.randn(400, 1, 4, 4, generator=generator)).clamp(-1, 1)
    x_0 = to_float((x * 127.5 + 127.5).round().byte())
    denoiser = gaussian_denoiser(diffusion)
    whole = variational_bound(diffusion, denoiser, x_0, generator, log_variance)
    estimate = bits_per_dim(diffusion, denoiser, x_0.split(100), 20, generator, log_variance)
    error = estimate.bits_per_dim - whole.total_bpd.mean().item()
    assert abs(error) < 4 * estimate.bits_per_dim_error and estimate.bits_per_dim_error < 0.1
    # No code can be shorter than the entropy of the data.
    entropy = 0.5 * torch.tensor(2 * torch.pi * torch.e * (0.2 * 127.5) ** 2).log2().item()
    assert whole.total_bpd.mean().item() > entropy - 0.02


def test_loss_vlb_is_the_vlb(diffusion):
    torch.manual_seed(0)
    x_0, noise = (
        to_float(torch.randint(256, (NUM_TIMESTEPS, 1, 4, 4)).byte()),
        torch.randn(NUM_TIMESTEPS, 1, 4, 4),
    )
    t, output = torch.arange(NUM_TIMESTEPS), torch.randn(NUM_TIMESTEPS, 2, 4, 4)
    terms = vb_terms_bpd(diffusion, output, x_0, diffusion.q_sample(x_0, t, noise), t)
    loss = loss_vlb(diffusion, lambda x_t, t: output, x_0, t, noise)
    assert loss.mean().item() == pytest.approx(terms.sum().item(), rel=1e-5)


# -- DDIM inversion and interpolation ------------------------


def test_inversion_is_undone_by_sampling_the_better_the_more_steps():
    process = GaussianDiffusion(cosine_betas(4000)).respace(range(3900))
    denoiser = gaussian_denoiser(process)
    image = torch.linspace(-0.5, 0.9, 9).view(9, 1, 1, 1)
    errors = []
    for n in (100, 200):
        few = process.respace_evenly(n)
        x_T = ddim_invert(few, denoiser, image, denoised_fn=None)
        *_, last = ddim_sample(few, denoiser, x_T, denoised_fn=None)
        errors.append((last.x_t - image).abs().max().item())  # at the smallest noise level, the image's
    assert errors[1] < 0.03 and errors[0] / errors[1] == pytest.approx(2, abs=0.4)


def test_slerp_keeps_the_standard_deviation_of_noise():
    a, b = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    between = slerp(a, b, torch.linspace(0, 1, 5))
    torch.testing.assert_close(between[0], a)
    torch.testing.assert_close(between[-1], b, rtol=0, atol=1e-5)
    assert between.flatten(1).std(1).sub(1).abs().max() < 0.03  # of the arithmetic mean: 0.71
    torch.testing.assert_close(slerp(a, a, torch.tensor([0.5]))[0], a, rtol=1e-4, atol=1e-4)
