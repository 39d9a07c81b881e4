"""Learned variance, the variational lower bound (VLB), and L_hybrid (Nichol & Dhariwal 2021, section 3.1).

The network's output now has 2C channels: eps_hat and v, which interpolates between the two limits of the
variance. Bits per dimension (bpd) are means over C, H, W of a base-2 logarithm, one number per sample.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.images import check_range
from common.protocols import DenoisedFn, Denoiser, LogVarianceFn
from lesson_01_ddpm.diffusion import GaussianDiffusion, clamp_x_0, fixed_small, gaussian_noise, squared_error


def learned_range(
    diffusion: GaussianDiffusion,
    output: Float[Tensor, "n out_c *size"],
    x_t: Float[Tensor, "n c *size"],
    t: Int[Tensor, "n"],
) -> Float[Tensor, "n c *size"]:
    """Return log variance = f log beta_t + (1 - f) log beta_tilde_t, f = (v + 1) / 2 (eq. 15).

    v is the second half of the output's channels and is not clipped. Raises ValueError if there is none.
    """
    c = x_t.shape[1]
    if output.shape[1] != 2 * c:
        raise ValueError(f"a learned variance needs {2 * c} output channels, not {output.shape[1]}")
    f = (output[:, c:] + 1) / 2
    low, high = diffusion.posterior_log_variance, diffusion.log_betas
    return f * diffusion.extract(high, t, x_t) + (1 - f) * diffusion.extract(low, t, x_t)


def learned_range_or_fixed_small(
    diffusion: GaussianDiffusion, output: Tensor, x_t: Tensor, t: Int[Tensor, "n"]
) -> Tensor:
    """Return the learned log variance if the output has one, else that of `fixed_small`."""
    learned = output.shape[1] > x_t.shape[1]
    return (learned_range if learned else fixed_small)(diffusion, output, x_t, t)


def normal_kl_bits(mean_1: Tensor, log_variance_1: Tensor, mean_2: Tensor, log_variance_2: Tensor) -> Tensor:
    """Return KL(N_1 || N_2) of Gaussians in bits, element by element."""
    difference = log_variance_1 - log_variance_2
    nats = 0.5 * (difference.exp() - 1 - difference + (mean_1 - mean_2) ** 2 * (-log_variance_2).exp())
    return nats / math.log(2)


def standard_normal_cdf(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return the tanh approximation of the CDF (Page 1977), as the published code does."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def discretized_nll_bits(
    x_0: Float[Tensor, "*shape"], mean: Float[Tensor, "*#shape"], log_variance: Float[Tensor, "*#shape"]
) -> Float[Tensor, "*shape"]:
    """Return -log2 of the Gaussian's probability of each 8-bit value (Ho et al. 2020, eq. 13).

    x_0 lies on the 8-bit grid in [-1, 1]. A value's bin is x_0 +- 1/255; the outermost are unbounded.
    """
    scale = (-0.5 * log_variance).exp()
    below = standard_normal_cdf(scale * (x_0 - mean - 1 / 255)).masked_fill(x_0 < -0.999, 0)
    above = standard_normal_cdf(scale * (x_0 - mean + 1 / 255)).masked_fill(x_0 > 0.999, 1)
    return -(above - below).clamp(min=1e-12).log2()


def vb_terms_bpd(
    diffusion: GaussianDiffusion,
    output: Float[Tensor, "n out_c *size"],
    x_0: Float[Tensor, "n c *size"],
    x_t: Float[Tensor, "n c *size"],
    t: Int[Tensor, "n"],
    log_variance_fn: LogVarianceFn = learned_range,
    denoised_fn: DenoisedFn | None = None,
) -> Float[Tensor, "n"]:
    """Return the term of the VLB at t in bits per dimension, for each sample (Ho et al. 2020, eq. 5).

    For t > 0 it is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); at t = 0 it is -log2 p(x_0 | x_1).
    output: the denoiser's for x_t.
    """
    p = diffusion.p_mean_variance(output, x_t, t, log_variance_fn, denoised_fn)
    q_mean = diffusion.q_posterior_mean(x_0, x_t, t)
    q_log_variance = diffusion.extract(diffusion.posterior_log_variance, t, x_t)
    kl = normal_kl_bits(q_mean, q_log_variance, p.mean, p.log_variance).flatten(1).mean(1)
    nll = discretized_nll_bits(x_0, p.mean, p.log_variance).flatten(1).mean(1)
    return torch.where(t.to(kl.device) == 0, nll, kl)


def prior_bpd(diffusion: GaussianDiffusion, x_0: Float[Tensor, "n ..."]) -> Float[Tensor, "n"]:
    """Return KL(q(x_T | x_0) || N(0, I)) in bits per dimension; it depends on the schedule alone."""
    alpha_bar = diffusion.alpha_bar[-1]
    mean = alpha_bar.sqrt() * x_0.cpu().double()  # float64 is not available on every GPU
    log_variance = (1 - alpha_bar).log().expand_as(mean)
    kl = normal_kl_bits(mean, log_variance, torch.zeros_like(mean), torch.zeros_like(mean))
    return kl.flatten(1).mean(1).float().to(x_0.device)


def loss_vlb(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c *size"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c *size"],
) -> Float[Tensor, "n"]:
    """Return T times the VLB's term at t, whose mean over uniform t is L_vlb without the prior term."""
    check_range(x_0)
    x_t = diffusion.q_sample(x_0, t, noise)
    output = diffusion.predict(denoiser, x_t, t)
    return diffusion.num_timesteps * vb_terms_bpd(diffusion, output, x_0, x_t, t)


def vlb_for_variance(
    diffusion: GaussianDiffusion,
    output: Float[Tensor, "n out_c *size"],
    x_0: Float[Tensor, "n c *size"],
    x_t: Float[Tensor, "n c *size"],
    t: Int[Tensor, "n"],
) -> Float[Tensor, "n"]:
    """Return the second half of L_hybrid: 0.001 L_vlb, estimated by T / 1000 times its term at t.

    The gradient is stopped at eps_hat and only trains the variance; its noise would drown L_simple's.
    """
    c = x_0.shape[1]
    stopped = torch.cat([output[:, :c].detach(), output[:, c:]], 1)
    return diffusion.num_timesteps / 1000 * vb_terms_bpd(diffusion, stopped, x_0, x_t, t)


def loss_hybrid(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c *size"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c *size"],
) -> Float[Tensor, "n"]:
    """Return L_hybrid = L_simple + 0.001 L_vlb (eq. 16), for each sample.

    Raises ValueError if x_0 is plainly not scaled to [-1, 1].
    """
    check_range(x_0)
    x_t = diffusion.q_sample(x_0, t, noise)
    output = diffusion.predict(denoiser, x_t, t)
    return squared_error(output, noise) + vlb_for_variance(diffusion, output, x_0, x_t, t)


class VLBTerms(NamedTuple):
    """The whole VLB of each image, and its terms in the order of sampling, noisiest first."""

    total_bpd: Float[Tensor, "n"]
    prior_bpd: Float[Tensor, "n"]
    vb_bpd: Float[Tensor, "n T"]
    x_0_mse: Float[Tensor, "n T"]  # of the predicted x_0
    eps_mse: Float[Tensor, "n T"]  # of the noise that the predicted x_0 implies


@torch.no_grad()
def variational_bound(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c *size"],
    generator: torch.Generator | None = None,
    log_variance_fn: LogVarianceFn = learned_range_or_fixed_small,
    denoised_fn: DenoisedFn | None = clamp_x_0,
) -> VLBTerms:
    """Return an upper bound of the model's bits per dimension for x_0: every term once, each with one x_t."""
    terms = []
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_0),), i)
        noise = gaussian_noise(x_0, generator)
        x_t = diffusion.q_sample(x_0, t, noise)
        output = diffusion.predict(denoiser, x_t, t)
        p = diffusion.p_mean_variance(output, x_t, t, log_variance_fn, denoised_fn)
        bits = vb_terms_bpd(diffusion, output, x_0, x_t, t, log_variance_fn, denoised_fn)
        eps_hat = diffusion.noise_from_x_0(x_t, t, p.x_0)
        terms.append(torch.stack([bits, squared_error(p.x_0, x_0), squared_error(eps_hat, noise)]))
    vb_bpd, x_0_mse, eps_mse = torch.stack(terms, -1)
    prior = prior_bpd(diffusion, x_0)
    return VLBTerms(vb_bpd.sum(1) + prior, prior, vb_bpd, x_0_mse, eps_mse)


class BPDEstimate(NamedTuple):
    bits_per_dim: float
    bits_per_dim_error: float  # standard error of the mean


@torch.no_grad()
def bits_per_dim(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    batches: Iterable[Float[Tensor, "_ c *size"]],
    draws: int = 1,
    generator: torch.Generator | None = None,
    log_variance_fn: LogVarianceFn = learned_range_or_fixed_small,
) -> BPDEstimate:
    """Estimate the VLB of a data set from `draws` random terms per image.

    Most bits are in the first few timesteps, so t is drawn with p_t ~ 1 / (t + 1) and a term is weighted by
    1 / p_t. batches: of x_0 on the 8-bit grid. `variational_bound` computes the exact sum over t, at the cost
    of T network evaluations per image.
    """
    values, p = [], 1 / torch.arange(1, diffusion.num_timesteps + 1).double()
    p = p / p.sum()
    for x_0 in batches:
        total = prior_bpd(diffusion, x_0)
        for _ in range(draws):
            t = torch.multinomial(p, len(x_0), replacement=True, generator=generator)
            x_t = diffusion.q_sample(x_0, t, gaussian_noise(x_0, generator))
            output = diffusion.predict(denoiser, x_t, t)
            term = vb_terms_bpd(diffusion, output, x_0, x_t, t, log_variance_fn, clamp_x_0)
            total = total + term / (draws * p[t].float().to(x_0.device))
        values.append(total.cpu())
    bits = torch.cat(values).double()
    return BPDEstimate(bits.mean().item(), (bits.std() / len(bits) ** 0.5).item())
