"""The maths is compared with simulation, Bayes' rule, closed forms and finite differences."""

import math
from functools import partial

import pytest
import torch

from common.images import to_float
from lesson_01_ddpm.diffusion import (
    GaussianDiffusion,
    clamp_x_0,
    ddpm_sample,
    fixed_large,
    fixed_small,
    linear_betas,
    loss_simple,
)
from lesson_02_improved_ddpm.ddim import ddim_sample
from lesson_02_improved_ddpm.schedules import cosine_betas, space_timesteps
from lesson_02_improved_ddpm.variational_bound import (
    discretized_nll_bits,
    learned_range,
    loss_hybrid,
    vb_terms_bpd,
)
from lesson_05_cfg import solutions
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample


@pytest.fixture
def diffusion():
    return GaussianDiffusion(cosine_betas(50))


def test_q_sample_is_the_chain_run_step_by_step(diffusion):
    generator = torch.Generator().manual_seed(0)
    x = x_0 = torch.full((200_000,), 0.7, dtype=torch.float64)
    for beta in diffusion.betas[:30]:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(
            x.shape, generator=generator, dtype=torch.float64
        )
    shape = (1, 1, 1, 1)
    t = torch.tensor([29])
    mean = diffusion.q_sample(x_0[0].view(shape).float(), t, torch.zeros(shape)).item()
    std = diffusion.q_sample(torch.zeros(shape), t, torch.ones(shape)).item()
    assert x.mean().item() == pytest.approx(mean, abs=0.01)
    assert x.std().item() == pytest.approx(std, rel=0.01)


def test_posterior_is_bayes_rule(diffusion):
    """q(x_{t-1} | x_t, x_0) is q(x_t | x_{t-1}) q(x_{t-1} | x_0), normalized on a grid."""
    i, x_0, x_t = 20, 0.4, -0.3
    grid = torch.linspace(-6, 6, 200_001, dtype=torch.float64)
    beta, alpha_bar = diffusion.betas[i], diffusion.alpha_bar[i - 1]
    log_p = -((x_t - (1 - beta).sqrt() * grid) ** 2) / (2 * beta)
    log_p = log_p - (grid - alpha_bar.sqrt() * x_0) ** 2 / (2 * (1 - alpha_bar))
    p = (log_p - log_p.max()).exp()
    p = p / p.sum()
    mean = (p * grid).sum()
    ours = diffusion.q_posterior_mean(*(torch.full((1, 1, 1, 1), x) for x in (x_0, x_t)), torch.tensor([i]))
    assert ours.item() == pytest.approx(mean.item(), abs=1e-6)
    assert diffusion.beta_tilde[i].item() == pytest.approx((p * (grid - mean) ** 2).sum().item(), rel=1e-6)


def test_noise_and_x_0_solve_each_other(diffusion):
    torch.manual_seed(0)
    x_0, noise, t = torch.rand(8, 3, 4, 4) * 2 - 1, torch.randn(8, 3, 4, 4), torch.arange(0, 48, 6)
    x_t = diffusion.q_sample(x_0, t, noise)
    torch.testing.assert_close(diffusion.x_0_from_noise(x_t, t, noise), x_0, rtol=0, atol=2e-4)
    torch.testing.assert_close(diffusion.noise_from_x_0(x_t, t, x_0), noise, rtol=0, atol=2e-4)


def test_kept_process_is_the_same_process(diffusion):
    kept = space_timesteps(50, "7")
    few = diffusion.respace(kept)
    torch.testing.assert_close(few.alpha_bar, diffusion.alpha_bar[kept], rtol=1e-12, atol=0)
    seen = []

    def denoiser(x_t, t):
        seen.append(t[0].item())
        return torch.zeros_like(x_t)

    for _ in ddpm_sample(few, denoiser, torch.zeros(1, 1, 2, 2)):
        pass
    assert seen == kept[::-1]  # the network is given the timesteps it was trained on


def test_one_step_is_enough_for_a_sampler_to_run(diffusion):
    for sampler in (ddpm_sample, ddim_sample, dpmpp_2m_sample):
        (step,) = sampler(diffusion.respace_evenly(1), lambda x_t, t: x_t, torch.ones(2, 1, 4, 4))
        assert step.x_prev.isfinite().all()


@pytest.mark.parametrize("spec", ["0", "51", "26,26", "ddim40"])
def test_impossible_respacing(spec):
    with pytest.raises(ValueError, match=r"of 50|of 25"):
        space_timesteps(50, spec)


@pytest.mark.parametrize("steps", [0, 51])
def test_too_many_steps(diffusion, steps):
    with pytest.raises(ValueError, match="of 50 timesteps"):
        diffusion.respace_evenly(steps)


@pytest.mark.parametrize("loss, channels", [(loss_simple, 1), (loss_hybrid, 2)])
def test_losses_refuse_images_that_are_not_scaled(diffusion, loss, channels):
    x = torch.arange(256.0).view(4, 1, 8, 8)
    t, noise = torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1, 8, 8)

    def denoiser(x_t, t):
        return torch.zeros(4, channels, 8, 8)

    scaled = to_float(x.byte())
    loss(diffusion, denoiser, scaled, t, noise)
    loss(diffusion, denoiser, scaled / 8 + 0.8, t, noise)  # pale, but scaled
    for wrong in (x, x / 255):
        with pytest.raises(ValueError, match="scaled to"):
            loss(diffusion, denoiser, wrong, t, noise)


# -- the ideal denoiser of a finite set ------------------------


def ideal_denoiser(images, process):
    """Return the optimal denoiser of a data set of these images: the posterior mean, as noise."""

    def denoiser(x_t, t):
        alpha_bar = process.alpha_bar[t].view(-1, 1)
        x = x_t.flatten(1).double()
        distance = torch.cdist(x, alpha_bar[:1].sqrt() * images.flatten(1).double()) ** 2
        x_0 = (-distance / (2 * (1 - alpha_bar))).softmax(1) @ images.flatten(1).double()
        eps = (x - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
        eps = eps.view_as(x_t).float()
        return torch.cat([eps, torch.zeros_like(eps)], 1)

    return denoiser


@pytest.mark.parametrize(
    "sampler",
    [
        partial(ddpm_sample, log_variance_fn=fixed_small),
        partial(ddpm_sample, log_variance_fn=fixed_large),
        partial(ddpm_sample, log_variance_fn=learned_range),
        ddim_sample,
        partial(ddim_sample, eta=1.0),
        dpmpp_2m_sample,
    ],
    ids=["ddpm-small", "ddpm-large", "ddpm-learned", "ddim", "ddim-eta1", "dpm++"],
)
@pytest.mark.parametrize("schedule", [linear_betas, cosine_betas])
def test_samples_of_the_ideal_denoiser_are_the_data(sampler, schedule):
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(5, 1, 4, 4, generator=generator) * 2 - 1
    process = GaussianDiffusion(schedule(400))
    x_T = torch.randn(60, 1, 4, 4, generator=generator)
    *_, last = sampler(process.respace_evenly(80), ideal_denoiser(images, process), x_T, generator)
    distance, nearest = torch.cdist(last.x_prev.flatten(1), images.flatten(1)).min(1)
    assert distance.max() < 1e-2
    assert len(nearest.unique()) == 5  # all of them, not one


def test_no_noise_at_the_last_step(diffusion):
    first, second = (
        list(
            ddpm_sample(
                diffusion, lambda x_t, t: x_t, torch.ones(1, 1, 4, 4), torch.Generator().manual_seed(s)
            )
        )
        for s in (0, 1)
    )
    assert not torch.equal(first[-2].x_prev, second[-2].x_prev)
    torch.testing.assert_close(first[-1].x_prev, first[-1].x_0)
    torch.testing.assert_close(second[-1].x_prev, second[-1].x_0)


# -- Gaussian data: the ODE's solution is known ------------------------

MEAN, STD = 0.3, 0.5


def even_in_lambda(process, n):
    """Return n of the process's timesteps, as even in lambda = log(alpha / sigma) as they can be."""
    return process.respace(
        solutions.even_in_lambda((process.alpha_bar / (1 - process.alpha_bar)).log() / 2, n)
    )


def gaussian_error(sampler, steps, respace=GaussianDiffusion.respace_evenly):
    """Return the error at the smallest noise level on Gaussian data."""
    process = GaussianDiffusion(cosine_betas(20_000)).respace(range(19_000))  # beyond, alpha_bar is nearly 0
    alpha_bar = process.alpha_bar

    def spread(i):
        return (alpha_bar[i] * STD**2 + 1 - alpha_bar[i]).sqrt()

    def exact_denoiser(x_t, t):
        a = alpha_bar[t].view(-1, 1, 1, 1)
        return (1 - a).sqrt() * (x_t - a.sqrt() * MEAN) / (a * STD**2 + 1 - a)

    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(9, 1, 1, 1)
    exact = alpha_bar[0].sqrt() * MEAN + spread(0) / spread(-1) * (x_T - alpha_bar[-1].sqrt() * MEAN)
    *_, last = sampler(respace(process, steps), exact_denoiser, x_T, denoised_fn=None)
    assert last.t == 0
    return (last.x_t - exact).abs().max().item()


def test_ddim_is_of_first_order():
    assert gaussian_error(ddim_sample, 40) / gaussian_error(ddim_sample, 80) == pytest.approx(2, abs=0.2)


def test_dpm_solver_is_of_second_order():
    errors = [gaussian_error(dpmpp_2m_sample, n, even_in_lambda) for n in (40, 80)]
    assert errors[0] / errors[1] == pytest.approx(4, abs=0.6)


@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_dpm_solver_is_better_than_ddim_with_timesteps_even_in_t(steps):
    # The last step to a noise level is then far longer in lambda than the one before: extrapolating fails.
    assert gaussian_error(dpmpp_2m_sample, steps) < 0.9 * gaussian_error(ddim_sample, steps)


# -- learned variance and the VLB ------------------------


def hybrid_at(diffusion, output, x_0, t, noise):
    return loss_hybrid(diffusion, lambda x_t, t: output, x_0, t, noise).sum()


def test_the_bound_gives_no_gradient_to_eps_and_a_right_one_to_v(diffusion):
    torch.manual_seed(0)
    x_0, noise, t = torch.rand(3, 1, 4, 4) * 2 - 1, torch.randn(3, 1, 4, 4), torch.tensor([0, 7, 45])
    output = torch.randn(3, 2, 4, 4, requires_grad=True)
    hybrid_at(diffusion, output, x_0, t, noise).backward()
    of_simple = 2 * (output[:, :1] - noise).detach() / 16
    torch.testing.assert_close(output.grad[:, :1], of_simple)

    for sample in range(3):  # the slope along v, also of the decoder's term at t = 0
        ends = []
        for step in (0.02, -0.02):
            moved = output.detach().clone()
            moved[sample, 1] += step
            ends.append(hybrid_at(diffusion, moved, x_0, t, noise).item())
        slope = (ends[0] - ends[1]) / 0.04
        assert output.grad[sample, 1].sum().item() == pytest.approx(slope, rel=0.05, abs=2e-5)


def test_vlb_is_zero_only_for_the_true_posterior(diffusion):
    torch.manual_seed(0)
    x_0, noise, t = torch.rand(4, 1, 4, 4) * 2 - 1, torch.randn(4, 1, 4, 4), torch.tensor([3, 10, 30, 45])
    x_t = diffusion.q_sample(x_0, t, noise)
    exact = torch.cat(
        [noise, torch.full_like(noise, -1.0)], 1
    )  # v = -1 is beta_tilde, the posterior's variance
    assert vb_terms_bpd(diffusion, exact, x_0, x_t, t).abs().max() < 1e-4
    assert vb_terms_bpd(diffusion, exact + 0.3, x_0, x_t, t).min() > 1e-4


def test_learned_range_needs_its_channels(diffusion):
    with pytest.raises(ValueError, match="2 output channels"):
        learned_range(diffusion, torch.zeros(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.tensor([1]))


@pytest.mark.parametrize("mean, log_variance", [(0.1, -3.0), (-0.97, -8.0), (0.99, -1.0)])
def test_the_decoder_gives_all_256_values_a_probability_of_one(mean, log_variance):
    values = to_float(torch.arange(256).byte())
    bits = discretized_nll_bits(values, torch.tensor(mean), torch.tensor(log_variance))
    assert (2**-bits).sum().item() == pytest.approx(1, abs=1e-4)


def test_decoder_agrees_with_the_exact_gaussian():
    values, mean, std = to_float(torch.arange(1, 255).byte()), 0.2, 0.1
    normal = torch.distributions.Normal(mean, std)
    exact = -(normal.cdf(values + 1 / 255) - normal.cdf(values - 1 / 255)).log2()
    likely = exact < 10  # far out, the tanh approximation of the CDF is coarse
    ours = discretized_nll_bits(values, torch.tensor(mean), torch.tensor(2 * math.log(std)))
    torch.testing.assert_close(ours[likely], exact[likely], rtol=0, atol=0.05)


def test_predicted_x_0_is_clipped_by_default(diffusion):
    *_, last = ddim_sample(diffusion, lambda x_t, t: -9 * x_t, torch.ones(1, 1, 4, 4))
    assert last.x_prev.abs().max() <= 1 and torch.equal(clamp_x_0(last.x_0), last.x_0)
