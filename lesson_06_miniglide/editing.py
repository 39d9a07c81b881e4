"""Changing a picture instead of drawing one, with a network that was never trained to.

Both ways keep what is there by taking it into the noise with them: an inpainted picture follows the known
pixels at every noise level (RePaint: Lugmayr et al. 2022), an edited one starts half way (SDEdit: Meng et al.
2022).
"""

import torch

from lesson_01_ddpm.diffusion import Step, clip, gaussian_noise
from lesson_02_improved_ddpm.variational_bound import learned_or_small


@torch.no_grad()
def inpaint_sample(
    diffusion,
    denoiser,
    x_T,
    generator=None,
    *,
    image,
    known,
    times=1,
    log_variance=learned_or_small,
    bound=clip,
):
    """Ancestral sampling in which the known pixels are those of the image, noised anew for each step
    (algorithm 1). Yields a Step per timestep.

    image: [N or 1, C, H, W]. known: [N or 1, 1, H, W], 1 where the image is kept. times: how often each step
    is taken; between, a step's noise is added again (resampling), so that what is drawn has as many chances
    to agree with what is known.
    """
    x_t, image, known = x_T, image.to(x_T.device), known.to(x_T.device)
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        for again in reversed(range(times if i > 0 else 1)):
            p = diffusion.p_mean_variance(diffusion.ask(denoiser, x_t, t), x_t, t, log_variance, bound)
            drawn, given = p.mean, image.expand_as(x_t)
            if i > 0:
                drawn = drawn + (0.5 * p.log_variance).exp() * gaussian_noise(x_t, generator)
                given = diffusion.q_sample(given, t - 1, gaussian_noise(x_t, generator))
            x_prev = known * given + (1 - known) * drawn
            if again:  # forward once more: q(x_t | x_{t-1})
                beta = diffusion.betas[i].item()
                x_t = (1 - beta) ** 0.5 * x_prev + beta**0.5 * gaussian_noise(x_t, generator)
        yield Step(i, x_t, p.x_0, x_prev)
        x_t = x_prev


def image_to_image(diffusion, denoiser, x_T, generator=None, *, image, strength, sampler):
    """Sample from the image with noise x_T, as much as at the share `strength` of the timesteps: 1 leaves
    nothing of it, less keeps first the layout, then also colours and shapes. Yields the sampler's Steps.

    image: [N or 1, C, H, W]. sampler: (diffusion, denoiser, x_T, generator) -> Steps. Raises ValueError if
    strength is not in (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"a strength of {strength}; it must be greater than 0 and at most 1")
    first_steps = diffusion.keep(torch.arange(max(1, round(strength * diffusion.num_timesteps))))
    t, image = torch.full((len(x_T),), first_steps.num_timesteps - 1), image.to(x_T.device).expand_as(x_T)
    return sampler(first_steps, denoiser, first_steps.q_sample(image, t, x_T), generator)
