"""DDIM: the same network, fewer steps, and no noise unless asked for (Song et al. 2021)."""

from functools import partial

import torch

from lesson_01_ddpm.diffusion import Step, clip, ddpm_sample, gaussian_noise
from lesson_02_improved_ddpm.variational_bound import learned_range


def ddim_mean_sigma(diffusion, x_t, t, x_0, eta):
    """x_{t-1} = mean + sigma * noise, given the predicted x_0 (eq. 12 and 16): both broadcast to x_t."""

    alpha_bar, previous = diffusion.alpha_bar, diffusion.alpha_bar_prev
    sigma = eta * ((1 - previous) / (1 - alpha_bar) * (1 - alpha_bar / previous)).sqrt()
    eps_hat = diffusion.noise_from_x_0(x_t, t, x_0)  # again, because x_0 may have been clipped
    direction = (1 - previous - sigma**2).clamp(min=0).sqrt()
    mean = diffusion.at(previous.sqrt(), t, x_t) * x_0 + diffusion.at(direction, t, x_t) * eps_hat
    return mean, diffusion.at(sigma, t, x_t)


@torch.no_grad()
def ddim_sample(diffusion, denoiser, x_T, generator=None, eta=0.0, bound=clip):
    """Sample from x_T [N, C, H, W], a step per timestep of `diffusion`. Yields a Step for each.

    eta: 0 is deterministic, a first-order solver of an ODE; 1 is as noisy as ancestral sampling.
    """
    x_t = x_T
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        output = diffusion.ask(denoiser, x_t, t)
        x_0 = diffusion.x_0_from_noise(x_t, t, output[:, : x_t.shape[1]])
        x_0 = bound(x_0) if bound else x_0
        x_prev, sigma = ddim_mean_sigma(diffusion, x_t, t, x_0, eta)
        if eta > 0 and i > 0:
            x_prev = x_prev + sigma * gaussian_noise(x_t, generator)
        yield Step(i, x_t, x_0, x_prev)
        x_t = x_prev


# The samplers that lessons from here on choose from, by name.
SAMPLERS = {"ddpm": partial(ddpm_sample, log_variance=learned_range), "ddim": ddim_sample}
