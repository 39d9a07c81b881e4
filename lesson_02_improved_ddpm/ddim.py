"""DDIM: the same network, fewer steps, no noise unless asked for, and a way back (Song et al. 2021)."""

from functools import partial

import torch

from lesson_01_ddpm.diffusion import Step, clip, ddpm_sample, gaussian_noise
from lesson_02_improved_ddpm.variational_bound import learned_or_small


def ddim_mean_sigma(diffusion, x_t, t, x_0, eta):
    """x_{t-1} = mean + sigma * noise, given the predicted x_0 (eq. 12 and 16): both broadcast to x_t."""
    alpha_bar, previous = diffusion.alpha_bar, diffusion.alpha_bar_prev
    sigma = eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()
    eps_hat = diffusion.noise_from_x_0(x_t, t, x_0)  # again, because x_0 may have been clipped
    direction = (1 - previous - sigma**2).clamp(min=0).sqrt()
    mean = diffusion.at(previous.sqrt(), t, x_t) * x_0 + diffusion.at(direction, t, x_t) * eps_hat
    return mean, diffusion.at(sigma, t, x_t)


def predict_x_0(diffusion, denoiser, x_t, t, bound):
    """x_0 [N, C, H, W] as the denoiser sees it in x_t, bounded."""
    output = diffusion.ask(denoiser, x_t, t)
    x_0 = diffusion.x_0_from_noise(x_t, t, output[:, : x_t.shape[1]])
    return bound(x_0) if bound else x_0


@torch.no_grad()
def ddim_sample(diffusion, denoiser, x_T, generator=None, eta=0.0, bound=clip):
    """Sample from x_T [N, C, H, W], a step per timestep of `diffusion`. Yields a Step for each.

    eta: 0 is deterministic, a first-order solver of an ODE; 1 is as noisy as ancestral sampling.
    """
    x_t = x_T
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        x_0 = predict_x_0(diffusion, denoiser, x_t, t, bound)
        x_prev, sigma = ddim_mean_sigma(diffusion, x_t, t, x_0, eta)
        if eta > 0 and i > 0:
            x_prev = x_prev + sigma * gaussian_noise(x_t, generator)
        yield Step(i, x_t, x_0, x_prev)
        x_t = x_prev


def ddim_next(diffusion, x_t, t, x_0):
    """One step of the same ODE the other way, to x_{t+1}; behind the last timestep waits pure noise."""
    following = torch.cat([diffusion.alpha_bar[1:], torch.zeros(1).double()])
    eps_hat = diffusion.noise_from_x_0(x_t, t, x_0)
    signal, spread = following.sqrt(), (1 - following).sqrt()
    return diffusion.at(signal, t, x_t) * x_0 + diffusion.at(spread, t, x_t) * eps_hat


@torch.no_grad()
def ddim_invert(diffusion, denoiser, image, bound=clip):
    """The x_T from which `ddim_sample` draws the image again, up to an error of first order in the steps.

    image: [N, C, H, W] in [-1, 1], taken for x_t at t = 0 (Song et al. 2021, section 5.4).
    """
    x_t = image
    for i in range(diffusion.num_timesteps - 1):
        t = torch.full((len(x_t),), i)
        x_t = ddim_next(diffusion, x_t, t, predict_x_0(diffusion, denoiser, x_t, t, bound))
    return x_t


def slerp(a, b, share):
    """From a (share = 0) to b (share = 1) along the sphere, so that noise stays as strong as noise.

    a, b: one noise image each, [C, H, W]. share: float [S]. Returns [S, C, H, W] (Shoemake 1985).
    """
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = cosine.clamp(-1, 1).acos().clamp(min=1e-3)  # of a and a it is 0
    share = share.to(a).view(-1, 1, 1, 1)
    return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()


# The samplers that lessons from here on choose from, by name.
SAMPLERS = {"ddpm": partial(ddpm_sample, log_variance=learned_or_small), "ddim": ddim_sample}
