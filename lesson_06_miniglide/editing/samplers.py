"""Editing images with a network that was only trained to draw them.

Both methods add noise to the given image: RePaint (Lugmayr et al. 2022) to its known pixels at every step,
SDEdit (Meng et al. 2022) to all of it before sampling starts.
"""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from common.protocols import DenoisedFn, Denoiser, LogVarianceFn, Sampler, SamplerStep
from lesson_01_ddpm.diffusion import GaussianDiffusion, clamp_x_0, gaussian_noise
from lesson_02_improved_ddpm.variational_bound import learned_range_or_fixed_small


@torch.no_grad()
def repaint_sample(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
    *,
    image: Float[Tensor, "#n c h w"],
    keep_mask: Float[Tensor, "#n 1 h w"],
    num_resamples: int = 1,
    log_variance_fn: LogVarianceFn = learned_range_or_fixed_small,
    denoised_fn: DenoisedFn | None = clamp_x_0,
) -> Iterator[SamplerStep]:
    """Fill the masked region of an image by ancestral sampling; yield one step per timestep.

    This is RePaint (Lugmayr et al. 2022, algorithm 1) with jumps of length 1. Each x_{t-1} takes its known
    pixels from the image with noise, and the others from the reverse step (section 4.1). keep_mask: 1 where
    the image is kept. num_resamples: how often each reverse step is taken. After each but the last, a forward
    step returns to x_t (section 4.2), so that the filled region can adapt to the known pixels.
    """
    x_t, image, keep_mask = x_T, image.to(x_T.device), keep_mask.to(x_T.device)
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        for remaining in reversed(range(num_resamples if i > 0 else 1)):
            output = diffusion.predict(denoiser, x_t, t)
            p = diffusion.p_mean_variance(output, x_t, t, log_variance_fn, denoised_fn)
            unknown, known = p.mean, image.expand_as(x_t)
            if i > 0:
                unknown = unknown + (0.5 * p.log_variance).exp() * gaussian_noise(x_t, generator)
                known = diffusion.q_sample(known, t - 1, gaussian_noise(x_t, generator))
            x_prev = keep_mask * known + (1 - keep_mask) * unknown
            if remaining:  # one step of the forward process: q(x_t | x_{t-1})
                beta = diffusion.betas[i].item()
                x_t = (1 - beta) ** 0.5 * x_prev + beta**0.5 * gaussian_noise(x_t, generator)
        yield SamplerStep(i, x_t, p.x_0, x_prev)
        x_t = x_prev


def image_to_image(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
    *,
    image: Float[Tensor, "#n c h w"],
    strength: float,
    sampler: Sampler,
) -> Iterator[SamplerStep]:
    """Sample a variation of an image, starting from the image with noise x_T; yield the sampler's steps.

    This is SDEdit (Meng et al. 2022, section 3), with any sampler. strength: the fraction of the timesteps
    that are sampled, in (0, 1]. At 1 sampling starts from nearly pure noise. The lower the strength, the more
    of the image is kept: first its layout, then also its colours and shapes. Raises ValueError for other
    strengths.
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength is {strength}; it must be greater than 0 and at most 1")
    first_steps = diffusion.respace(torch.arange(max(1, round(strength * diffusion.num_timesteps))))
    t, image = torch.full((len(x_T),), first_steps.num_timesteps - 1), image.to(x_T.device).expand_as(x_T)
    return sampler(first_steps, denoiser, first_steps.q_sample(image, t, x_T), generator)
