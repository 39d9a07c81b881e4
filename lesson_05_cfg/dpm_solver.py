"""DPM-Solver++(2M): the sampling ODE solved in 15-20 steps (Lu et al. 2022, algorithm 2)."""

import torch

from lesson_01_ddpm.diffusion import Step, clip
from lesson_02_improved_ddpm import ddim


@torch.no_grad()
def dpm_solver_sample(diffusion, denoiser, x_T, generator=None, bound=clip):
    """Sample from x_T [N, C, H, W], a step per timestep of `diffusion`. Yields a Step for each.
    Deterministic.

    Between two timesteps the predicted x_0 is taken as constant: at its value in the middle of the step, to
    which the line through the prediction here and the one before leads, in lambda = log(alpha / sigma). The
    first step has no prediction before it, and the last goes to sigma = 0, infinitely far in lambda: these
    two take x_0 as it is here. (`generator` is there for the samplers' common form.)
    """
    alpha, sigma = diffusion.alpha_bar.sqrt(), (1 - diffusion.alpha_bar).sqrt()
    lambda_ = (alpha / sigma).log()
    x_t, x_0_before = x_T, None
    for i in reversed(range(diffusion.num_timesteps)):
        t = torch.full((len(x_t),), i)
        x_0 = ddim.predict_x_0(diffusion, denoiser, x_t, t, bound)
        if i == 0:
            x_prev = x_0
        else:
            h = lambda_[i - 1] - lambda_[i]
            x_0_here = x_0
            if x_0_before is not None:
                r = (lambda_[i] - lambda_[i + 1]) / h
                x_0_here = x_0 + (x_0 - x_0_before) / (2 * r.item())
            ratio, weight = sigma[i - 1] / sigma[i], -alpha[i - 1] * torch.expm1(-h)
            x_prev = ratio.item() * x_t + weight.item() * x_0_here
        yield Step(i, x_t, x_0, x_prev)
        x_t, x_0_before = x_prev, x_0


SAMPLERS = {**ddim.SAMPLERS, "dpm++": dpm_solver_sample}
