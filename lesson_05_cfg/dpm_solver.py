"""DPM-Solver++(2M): the sampling ODE solved in 15 to 20 steps (Lu et al. 2022, algorithm 2)."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from common.protocols import DenoisedFn, Denoiser, Sampler, SamplerStep
from lesson_01_ddpm.diffusion import GaussianDiffusion, clamp_x_0
from lesson_02_improved_ddpm import ddim


@torch.no_grad()
def dpmpp_2m_sample(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_T: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
    denoised_fn: DenoisedFn | None = clamp_x_0,
    lower_order_final: bool = True,
) -> Iterator[SamplerStep]:
    """Sample deterministically from x_T, white noise; yield one step per timestep.

    Within a step the predicted x_0 is held constant at its value in the middle of the step, extrapolated
    linearly in lambda = log(alpha / sigma) from the predictions here and one step earlier. Two steps use x_0
    as it is predicted here: the first, which has no earlier prediction, and the last, which ends at
    sigma = 0, infinitely far in lambda. (`generator` is not used; samplers share one signature.)

    lower_order_final: also do not extrapolate in the step before the last. With timesteps even in t it is
    several times as long in lambda as its predecessor. (The authors' code has this option, too.)
    """
    alpha, sigma = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()
    lambda_ = (alpha / sigma).log()
    x_t, x_0_before = x_T, None
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        x_0 = ddim.predict_x_0(diffusion, denoiser, x_t, t, denoised_fn)
        if i == 0:
            x_prev = x_0
        else:
            h = lambda_[i - 1] - lambda_[i]
            x_0_mid = x_0
            if x_0_before is not None and (i > 1 or not lower_order_final):
                r = (lambda_[i] - lambda_[i + 1]) / h
                x_0_mid = x_0 + (x_0 - x_0_before) / (2 * r.item())
            ratio, weight = sigma[i - 1] / sigma[i], -alpha[i - 1] * torch.expm1(-h)
            x_prev = ratio.item() * x_t + weight.item() * x_0_mid
        yield SamplerStep(i, x_t, x_0, x_prev)
        x_t, x_0_before = x_prev, x_0


# The samplers that lessons from here on offer, by name.
SAMPLERS: dict[str, Sampler] = {**ddim.SAMPLERS, "dpm++": dpmpp_2m_sample}
