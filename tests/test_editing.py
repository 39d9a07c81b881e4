"""RePaint and SDEdit on Gaussian data, whose conditional distributions are known."""

from functools import partial

import pytest
import torch

from lesson_01_ddpm.diffusion import GaussianDiffusion, fixed_small
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_06_miniglide.editing.samplers import image_to_image, repaint_sample

PROCESS = GaussianDiffusion(cosine_betas(1000))
CORRELATION, SPREAD = 0.9, 0.5
COVARIANCE = SPREAD**2 * torch.tensor([[1, CORRELATION], [CORRELATION, 1]], dtype=torch.float64)


def two_pixels():
    """The ideal denoiser for pairs of correlated pixels, N(0, SPREAD^2) each."""

    def denoiser(x_t, t):
        a = PROCESS.alpha_bar[t[0]]
        x = x_t.flatten(1).double()
        gain = a.sqrt() * COVARIANCE @ torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2))
        return ((x - a.sqrt() * x @ gain.T) / (1 - a).sqrt()).view_as(x_t)

    return denoiser


def inpainted(num_resamples, n=2000):
    """Samples of the second pixel where the first is known to be 0.6."""
    image, keep_mask = torch.tensor([0.6, 0.0]).view(1, 1, 1, 2), torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(n, 1, 1, 2, generator=generator)
    *_, last = repaint_sample(
        PROCESS.respace_evenly(100),
        two_pixels(),
        x_T,
        generator,
        image=image,
        keep_mask=keep_mask,
        num_resamples=num_resamples,
        log_variance_fn=fixed_small,
        denoised_fn=None,
    )
    assert (last.x_prev[..., 0] == 0.6).all()  # exactly
    return last.x_prev[..., 1].flatten()


def test_resampling_approaches_the_conditional_distribution():
    """p(second | first = 0.6) has mean 0.54 and standard deviation 0.22."""
    mean, deviation = CORRELATION * 0.6, SPREAD * (1 - CORRELATION**2) ** 0.5
    once, often = inpainted(1), inpainted(10)
    error_once, error_often = abs(once.mean() - mean), abs(often.mean() - mean)
    assert error_often < 0.05 and error_once > 2 * error_often
    assert abs(often.std() - deviation) < 0.05


def ancestral_covariance(process):
    """The exact covariance of ancestral samples: reverse steps are linear in x_t, with known noise."""
    a, covariance = process.alpha_bar.double(), torch.eye(2).double()
    betas, a_prev = process.betas.double(), torch.cat([torch.ones(1).double(), a[:-1]])
    for i in reversed(range(process.num_timesteps)):
        x_0 = a[i].sqrt() * COVARIANCE @ torch.linalg.inv(a[i] * COVARIANCE + (1 - a[i]) * torch.eye(2))
        step = (
            a_prev[i].sqrt() * betas[i] * x_0 + (1 - betas[i]).sqrt() * (1 - a_prev[i]) * torch.eye(2)
        ) / (1 - a[i])
        beta_tilde = betas[i] * (1 - a_prev[i]) / (1 - a[i])
        covariance = step @ covariance @ step.T + beta_tilde * torch.eye(2)
    return covariance


def test_an_empty_mask_gives_plain_sampling():
    process, nothing = PROCESS.respace_evenly(50), torch.zeros(1, 1, 1, 2)
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(20_000, 1, 1, 2, generator=generator)
    sampled = repaint_sample(
        process,
        two_pixels(),
        x_T,
        generator,
        image=x_T,
        keep_mask=nothing,
        log_variance_fn=fixed_small,
        denoised_fn=None,
    )
    *_, last = sampled
    torch.testing.assert_close(
        last.x_prev.flatten(1).T.cov().double(), ancestral_covariance(process), rtol=0.05, atol=0
    )


@pytest.mark.parametrize("strength", [0.1, 0.4, 0.7, 1.0])
def test_image_to_image_keeps_more_at_lower_strength(strength):
    """DDIM maps N(0, a C + (1 - a) I) to N(0, C) linearly, so the correlation with the image is known."""
    torch.manual_seed(0)
    image = (torch.randn(20_000, 2).double() @ torch.linalg.cholesky(COVARIANCE).T).view(-1, 1, 1, 2)
    process, ideal = PROCESS.respace_evenly(100), two_pixels()
    sampler, noise = partial(ddim_sample, denoised_fn=None), torch.randn(image.shape)
    *_, last = image_to_image(process, ideal, noise, image=image.float(), strength=strength, sampler=sampler)
    a = process.alpha_bar[round(100 * strength) - 1]
    values, modes = torch.linalg.eigh(COVARIANCE)
    gain = modes @ (values / (a * values + 1 - a)).sqrt().diag() @ modes.T
    expected = (a.sqrt() * gain @ COVARIANCE)[0, 0] / SPREAD**2
    before, after = image[..., 0].flatten().float(), last.x_prev[..., 0].flatten()
    assert torch.corrcoef(torch.stack([before, after]))[0, 1] == pytest.approx(expected.item(), abs=0.03)
    assert after.std() == pytest.approx(SPREAD, rel=0.05)


@pytest.mark.parametrize("strength", [0, -1, 1.5, float("nan")])
def test_invalid_strengths_are_refused(strength):
    with pytest.raises(ValueError, match="at most 1"):
        x = torch.zeros(1, 1, 1, 2)
        image_to_image(PROCESS, two_pixels(), x, image=x, strength=strength, sampler=ddim_sample)
