"""DDIM: fewer steps with the same network, deterministic by default, and invertible (Song et al. 2021)."""

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.protocols import DenoisedFn, Denoiser, Sampler, SamplerStep
from lesson_01_ddpm.diffusion import GaussianDiffusion, clamp_x_0, ddpm_sample, gaussian_noise
from lesson_02_improved_ddpm.variational_bound import learned_range_or_fixed_small


def ddim_mean_sigma(
    diffusion: GaussianDiffusion,
    x_t: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    x_0: Float[Tensor, "n c h w"],
    eta: float,
) -> tuple[Float[Tensor, "n c h w"], Float[Tensor, "n 1 1 1"]]:
    """Return mean and sigma of x_{t-1} = mean + sigma * noise, given the predicted x_0 (eq. 12 and 16)."""
    alpha_bar, previous = diffusion.alpha_bar, diffusion.alpha_bar_prev
    sigma = eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()
    eps_hat = diffusion.noise_from_x_0(x_t, t, x_0)  # computed again, because x_0 may have been clipped
    direction = (1 - previous - sigma**2).clamp(min=0).sqrt()
    mean = diffusion.extract(previous.sqrt(), t, x_t) * x_0 + diffusion.extract(direction, t, x_t) * eps_hat
    return mean, diffusion.extract(sigma, t, x_t)


def predict_x_0(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_t: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    denoised_fn: DenoisedFn | None,
) -> Float[Tensor, "n c h w"]:
    """Return the denoiser's prediction of x_0, passed through `denoised_fn` if there is one."""
    output = diffusion.predict(denoiser, x_t, t)
    x_0 = diffusion.x_0_from_noise(x_t, t, output[:, : x_t.shape[1]])
    return denoised_fn(x_0) if denoised_fn else x_0


@torch.no_grad()
def ddim_sample(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
    eta: float = 0.0,
    denoised_fn: DenoisedFn | None = clamp_x_0,
) -> Iterator[SamplerStep]:
    """Sample from x_T, white noise; yield one step per timestep.

    eta: 0 is deterministic, a first-order solver of an ODE; 1 adds as much noise as ancestral sampling.
    """
    x_t = x_T
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        x_0 = predict_x_0(diffusion, denoiser, x_t, t, denoised_fn)
        x_prev, sigma = ddim_mean_sigma(diffusion, x_t, t, x_0, eta)
        if eta > 0 and i > 0:
            x_prev = x_prev + sigma * gaussian_noise(x_t, generator)
        yield SamplerStep(i, x_t, x_0, x_prev)
        x_t = x_prev


def ddim_reverse_step(
    diffusion: GaussianDiffusion,
    x_t: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    x_0: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n c h w"]:
    """Take one step of the same ODE towards noise, to x_{t+1}; after the last timestep it is pure noise."""
    following = torch.cat([diffusion.alpha_bar[1:], torch.zeros(1).double()])
    eps_hat = diffusion.noise_from_x_0(x_t, t, x_0)
    signal_scale, noise_scale = following.sqrt(), (1 - following).sqrt()
    return diffusion.extract(signal_scale, t, x_t) * x_0 + diffusion.extract(noise_scale, t, x_t) * eps_hat


@torch.no_grad()
def ddim_invert(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    image: Float[Tensor, "n c h w"],
    denoised_fn: DenoisedFn | None = clamp_x_0,
) -> Float[Tensor, "n c h w"]:
    """Return the x_T from which `ddim_sample` reproduces the image, up to a first-order error.

    image: in [-1, 1], taken as x_t at t = 0 (Song et al. 2021, section 5.4).
    """
    x_t = image
    for i in range(diffusion.num_timesteps - 1):
        t = torch.full((len(x_t),), i)
        x_t = ddim_reverse_step(diffusion, x_t, t, predict_x_0(diffusion, denoiser, x_t, t, denoised_fn))
    return x_t


def slerp(
    a: Float[Tensor, "c h w"], b: Float[Tensor, "c h w"], weight: Float[Tensor, "s"]
) -> Float[Tensor, "s c h w"]:
    """Interpolate two noise images along the sphere, so that the norm stays that of noise (Shoemake 1985).

    weight: 0 returns a, 1 returns b.
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-3)  # it is 0 for equal images
    weight = weight.to(a).view(-1, 1, 1, 1)
    return (((1 - weight) * angle).sin() * a + (weight * angle).sin() * b) / angle.sin()


# The samplers that lessons from here on offer, by name.
SAMPLERS: dict[str, Sampler] = {
    "ddpm": partial(ddpm_sample, log_variance_fn=learned_range_or_fixed_small),
    "ddim": ddim_sample,
}
