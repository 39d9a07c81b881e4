"""Exercises of lesson 2. Fill in a function, then see what its check says:

    python lesson_02_improved_ddpm/exercises.py

No training is needed. The answers stand in solutions.ipynb.
"""

import math

import torch

from common.exercises import Wrong, close, run_checks

# -- 1. The cosine schedule        topic: schedules; easy; 10 minutes


def cosine_schedule(num_timesteps):
    """betas, float64 [T]: alpha_bar falls like f(u) = cos^2((u + 0.008) / 1.008 * pi / 2), u = t / T.

    Hint: alpha_bar after step t (counted from 0) is f((t + 1) / T) / f(0); a beta is 1 minus the ratio of two
    alpha_bar that follow each other, but at most 0.999.
    """
    raise NotImplementedError


def check_cosine_schedule(answer=cosine_schedule):
    """The product of 1 - beta must follow the curve that was asked for."""
    betas = answer(100)
    wanted = [math.cos((u / 100 + 0.008) / 1.008 * math.pi / 2) ** 2 for u in range(101)]
    wanted = torch.tensor(wanted, dtype=torch.float64) / wanted[0]
    if betas.shape != (100,):
        raise Wrong(f"100 betas are wanted, not {tuple(betas.shape)}: T steps lie between T + 1 values of f")
    if betas.max() > 0.9991:
        raise Wrong(f"the last beta is {betas[-1]:.4f}; without a limit of 0.999 nothing at all is left")
    off = ((1 - betas).cumprod(0) - wanted[1:]).abs()[:-1]
    if off.max() > 1e-6:
        found = f"alpha_bar is off by up to {off.max():.4f}, most at t = {off.argmax()}"
        raise Wrong(f"{found}. Is it the betas that you return, and does the first step already add noise?")


# -- 2. Fewer timesteps of the same process        topic: respacing; medium; 10 minutes


def respaced_betas(alpha_bar, timesteps):
    """The betas of the process that has only these timesteps (increasing), at their old noise levels.

    Hint: one step of the new process must do what several of the old ones did.
    """
    raise NotImplementedError


def check_respaced_betas(answer=respaced_betas):
    """Noise levels must stay: the product of the new 1 - beta is the old alpha_bar."""
    betas = torch.linspace(0.001, 0.02, 100, dtype=torch.float64)
    alpha_bar, timesteps = (1 - betas).cumprod(0), torch.tensor([9, 39, 69, 99])
    ours = answer(alpha_bar, timesteps)
    if close(ours, betas[timesteps]):
        raise Wrong(
            "these are the old betas of the kept timesteps; a new step does the skipped ones' work too"
        )
    if not close((1 - ours).cumprod(0), alpha_bar[timesteps]):
        levels, wanted = ((1 - ours).cumprod(0).tolist(), alpha_bar[timesteps].tolist())
        raise Wrong(f"the noise levels alpha_bar are {levels}, but were {wanted}")


# -- 3. A variance between two limits        topic: learned variance; easy; 5 minutes


def log_variance(v, beta, beta_tilde):
    """The network's choice: log beta_tilde at v = -1, log beta at v = 1, evenly on the log scale between."""
    raise NotImplementedError


def check_log_variance(answer=log_variance):
    """Both ends, and the middle: the geometric mean."""
    beta, beta_tilde = torch.tensor(0.04), torch.tensor(0.01)
    low, middle, high = (answer(torch.tensor(v), beta, beta_tilde).exp().item() for v in (-1.0, 0.0, 1.0))
    if abs(low - 0.04) < 1e-4 and abs(high - 0.01) < 1e-4:
        raise Wrong("the range is swapped: v = 1 must be the larger variance, beta")
    if abs(low - 0.01) > 1e-4 or abs(high - 0.04) > 1e-4:
        raise Wrong(f"v = -1 gives {low:.4f} and v = 1 gives {high:.4f}; wanted 0.0100 and 0.0400")
    if abs(middle - 0.02) > 1e-4:
        raise Wrong(f"the middle is {middle:.4f}; evenly on the log scale it is 0.0200, the geometric mean")


# -- 4. What the bound may teach        topic: L_hybrid; medium; 10 minutes


def for_the_bound(output):
    """The network's output [N, 2C, H, W] as the bound should see it: the same numbers, but the gradient goes
    into v (the second C channels) only.

    Hint: `detach`, and `torch.cat`.
    """
    raise NotImplementedError


def check_for_the_bound(answer=for_the_bound):
    """The gradient of any function of it."""
    output = torch.randn(2, 6, 4, 4, requires_grad=True)
    seen = answer(output)
    if not close(seen, output):
        raise Wrong("the numbers or their order changed; only the gradient should")
    if not seen.requires_grad:
        raise Wrong("no gradient is left at all: v must learn")
    seen.square().sum().backward()
    eps, v = output.grad[:, :3].abs().sum(), output.grad[:, 3:].abs().sum()
    if eps > 0 and v > 0:
        raise Wrong("the bound still reaches eps_hat, and would drown L_simple there")
    if v == 0:
        raise Wrong("the wrong half is held fixed: eps_hat comes first, v second")


# -- 5. A step without noise        topic: DDIM; medium; 15 minutes


def ddim_step(x_t, eps_hat, alpha_bar_t, alpha_bar_before):
    """x_{t-1} of DDIM with eta = 0. alpha_bar_t, alpha_bar_before: numbers.

    Hint: take x_t apart into picture and noise, and mix them again at the noise level of t - 1.
    """
    raise NotImplementedError


def check_ddim_step(answer=ddim_step):
    """Given the true noise, the step must land on the same picture and noise, at the level before."""
    x_0, noise = torch.tensor([0.8, -0.3, 0.0]), torch.tensor([0.5, 1.2, -1.0])

    def level(a):
        return a**0.5 * x_0 + (1 - a) ** 0.5 * noise

    ours = answer(level(0.3), noise, 0.3, 0.6)
    if close(ours, 0.6**0.5 * x_0):
        raise Wrong("the picture is at the right level, but its noise is gone: DDIM puts eps_hat back")
    if close(ours, x_0):
        raise Wrong("that is the predicted picture itself; a step goes to the noise level before, no further")
    if not close(ours, level(0.6)):
        raise Wrong(f"the step lands on {ours.tolist()}; at the level before are {level(0.6).tolist()}")


CHECKS = [
    check_cosine_schedule,
    check_respaced_betas,
    check_log_variance,
    check_for_the_bound,
    check_ddim_step,
]

if __name__ == "__main__":
    run_checks(CHECKS)
