"""Learned variance, the variational bound in bits, and L_hybrid (Nichol & Dhariwal 2021, section 3.1).

The network's output now has 2C channels: eps_hat, and v, which says where between its two limits the variance
lies. Bits are per dimension: means over C, H, W of a base-2 logarithm, one number a sample.
"""

import math
from typing import NamedTuple

import torch

from common.data import check_range
from lesson_01_ddpm.diffusion import clip, fixed_small, gaussian_noise, squared_error


def learned_range(diffusion, output, x_t, t):
    """log variance = f log beta_t + (1 - f) log beta_tilde_t, f = (v + 1) / 2 (eq. 15); v is not clamped."""
    c = x_t.shape[1]
    if output.shape[1] != 2 * c:
        raise ValueError(f"a learned variance needs {2 * c} output channels, not {output.shape[1]}")
    f = (output[:, c:] + 1) / 2
    low, high = diffusion.posterior_log_variance, diffusion.log_betas
    return f * diffusion.at(high, t, x_t) + (1 - f) * diffusion.at(low, t, x_t)


def normal_kl_bits(mean_1, log_variance_1, mean_2, log_variance_2):
    """KL(N_1 || N_2) of Gaussians, element by element, in bits."""
    difference = log_variance_1 - log_variance_2
    nats = 0.5 * (difference.exp() - 1 - difference + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())
    return nats / math.log(2)


def standard_normal_cdf(z):
    """The tanh approximation (Page 1977) that the published code uses."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def decoder_bits(x_0, mean, log_variance):
    """-log2 of the probability that the Gaussian gives to each 8-bit value's bin (Ho et al. 2020, eq. 13).

    The bins are x_0 +- 1/255, the outermost ones open to infinity; x_0 lies on the 8-bit grid in [-1, 1].
    """
    scale = (-0.5 * log_variance).exp()
    below = standard_normal_cdf(scale * (x_0 - mean - 1 / 255)).masked_fill(x_0 < -0.999, 0)
    above = standard_normal_cdf(scale * (x_0 - mean + 1 / 255)).masked_fill(x_0 > 0.999, 1)
    return -(above - below).clamp(min=1e-12).log2()


def learned_or_small(diffusion, output, x_t, t):
    """The network's log variance if it gives one, else beta_tilde's: for samplers that serve both."""
    learned = output.shape[1] > x_t.shape[1]
    return (learned_range if learned else fixed_small)(diffusion, output, x_t, t)


def vb_terms_bits(diffusion, output, x_0, x_t, t, log_variance=learned_range, bound=None):
    """One term of the variational bound for each sample, in bits per dimension: [N].

    L_{t}: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 the decoder's -log2 p(x_0 | x_1)
    (Ho et al. 2020, eq. 5). output: the denoiser's for x_t.
    """
    p = diffusion.p_mean_variance(output, x_t, t, log_variance, bound)
    q_mean = diffusion.q_posterior_mean(x_0, x_t, t)
    q_log_variance = diffusion.at(diffusion.posterior_log_variance, t, x_t)
    kl = normal_kl_bits(q_mean, q_log_variance, p.mean, p.log_variance).flatten(1).mean(1)
    decoder = decoder_bits(x_0, p.mean, p.log_variance).flatten(1).mean(1)
    return torch.where(t.to(kl.device) == 0, decoder, kl)


def prior_bits(diffusion, x_0):
    """KL(q(x_T | x_0) || N(0, I)), in bits per dimension: [N]. Training cannot change it, schedules can."""
    alpha_bar = diffusion.alpha_bar[-1]
    mean = alpha_bar.sqrt() * x_0.cpu().double()  # in float64, which not every GPU has
    log_variance = (1 - alpha_bar).log().expand_as(mean)
    kl = normal_kl_bits(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(mean))
    return kl.flatten(1).mean(1).float().to(x_0.device)


def loss_vlb(diffusion, denoiser, x_0, t, noise):
    """T times the bound's term at t, whose mean over a uniform t is L_vlb without its constant prior: [N]."""
    check_range(x_0)
    x_t = diffusion.q_sample(x_0, t, noise)
    return diffusion.num_timesteps * vb_terms_bits(diffusion, diffusion.ask(denoiser, x_t, t), x_0, x_t, t)


def loss_hybrid(diffusion, denoiser, x_0, t, noise):
    """L_hybrid = L_simple + 0.001 L_vlb (eq. 16), one number a sample: [N].

    L_vlb is estimated by T times the term at the t drawn, hence the weight T / 1000. The bound teaches the
    variance only: eps_hat is cut out of its gradient, or its far larger variance would drown L_simple's.
    Raises ValueError if x_0 is plainly not scaled to [-1, 1].
    """
    check_range(x_0)
    x_t = diffusion.q_sample(x_0, t, noise)
    output = diffusion.ask(denoiser, x_t, t)
    channels = x_0.shape[1]
    frozen = torch.cat([output[:, :channels].detach(), output[:, channels:]], 1)
    bits = vb_terms_bits(diffusion, frozen, x_0, x_t, t)
    return squared_error(output, noise) + diffusion.num_timesteps / 1000 * bits


class Bound(NamedTuple):
    """The whole bound of each image, and its terms in the order of sampling, the noisiest first."""

    total_bits: torch.Tensor  # [N]
    prior_bits: torch.Tensor  # [N]
    vb_bits: torch.Tensor  # [N, T]
    x_0_mse: torch.Tensor  # [N, T] of the predicted x_0
    eps_mse: torch.Tensor  # [N, T] of the noise that the predicted x_0 implies


@torch.no_grad()
def variational_bound(diffusion, denoiser, x_0, generator=None, log_variance=learned_or_small, bound=clip):
    """Bits per dimension that the model needs for x_0 at most: every term once, x_t drawn once for each."""
    terms = []
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_0),), i)
        noise = gaussian_noise(x_0, generator)
        x_t = diffusion.q_sample(x_0, t, noise)
        output = diffusion.ask(denoiser, x_t, t)
        p = diffusion.p_mean_variance(output, x_t, t, log_variance, bound)
        bits = vb_terms_bits(diffusion, output, x_0, x_t, t, log_variance, bound)
        eps_hat = diffusion.noise_from_x_0(x_t, t, p.x_0)
        terms.append(torch.stack([bits, squared_error(p.x_0, x_0), squared_error(eps_hat, noise)]))
    vb_bits, x_0_mse, eps_mse = torch.stack(terms, -1)
    prior = prior_bits(diffusion, x_0)
    return Bound(vb_bits.sum(1) + prior, prior, vb_bits, x_0_mse, eps_mse)


class Estimate(NamedTuple):
    bits_per_dim: float
    bits_per_dim_error: float  # the standard error of that mean


@torch.no_grad()
def bits_per_dim(diffusion, denoiser, batches, draws=1, generator=None, log_variance=learned_or_small):
    """Monte Carlo estimate of the bound over a data set: for each image, `draws` terms at random t.

    Most bits are in the first few steps, so t is drawn with p_t ~ 1 / (t + 1), and a term counts 1 / p_t.
    batches: an iterable of x_0 [N, C, H, W] on the 8-bit grid. The exact sum over t is `variational_bound`'s,
    at T network evaluations an image.
    """
    values, p = [], 1 / torch.arange(1, diffusion.num_timesteps + 1).double()
    p = p / p.sum()
    for x_0 in batches:
        total = prior_bits(diffusion, x_0)
        for _ in range(draws):
            t = torch.multinomial(p, len(x_0), replacement=True, generator=generator)
            x_t = diffusion.q_sample(x_0, t, gaussian_noise(x_0, generator))
            output = diffusion.ask(denoiser, x_t, t)
            term = vb_terms_bits(diffusion, output, x_0, x_t, t, log_variance, clip)
            total = total + term / (draws * p[t].float().to(x_0.device))
        values.append(total.cpu())
    values = torch.cat(values).double()
    return Estimate(values.mean().item(), (values.std() / len(values) ** 0.5).item())
