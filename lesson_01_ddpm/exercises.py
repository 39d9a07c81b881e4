"""Exercises of lesson 1. Fill in a function, then see what its check says:

    python lesson_01_ddpm/exercises.py

No training is needed. The answers stand in solutions.ipynb.
"""

import torch

from common.exercises import Wrong, close, run_checks
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas

# -- 1. From the picture to any noise level in one step        topic: forward process; easy; 5 minutes


def noisy(x_0, noise, alpha_bar_t):
    """x_t, given the picture, the noise and alpha_bar at t (a number).

    Hint: the squares of the two factors add up to 1.
    """
    raise NotImplementedError


def check_noisy(answer=noisy):
    """One number, walked through the chain step by step ten thousand times."""
    betas, x = linear_betas(200)[:60], torch.full((10_000,), 0.6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for beta in betas:
        x = (1 - beta).sqrt() * x + beta.sqrt() * torch.randn(x.shape, generator=generator).double()
    alpha_bar = (1 - betas).prod()
    x_0, noise = torch.tensor([0.6, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    mean, std = answer(x_0, noise, alpha_bar).tolist()
    if abs(mean - x.mean()) > 0.05:
        found = f"without noise a pixel of 0.6 becomes {mean:.3f}; the chain's mean is {x.mean():.3f}"
        raise Wrong(f"{found}. Is the picture multiplied by the square root of alpha_bar?")
    if abs(std - x.std()) > 0.05:
        found = f"the noise has a strength of {std:.3f}; the chain's is {x.std():.3f}"
        raise Wrong(f"{found}. Variances add, not standard deviations: a root is missing, or too many")


# -- 2. The picture behind a guess of the noise        topic: prediction; easy; 5 minutes


def predicted_x_0(x_t, eps_hat, alpha_bar_t):
    """The picture that x_t would come from, if eps_hat were the noise in it.

    Hint: solve exercise 1 for x_0.
    """
    raise NotImplementedError


def check_predicted_x_0(answer=predicted_x_0):
    """Noise added with lesson 1's code must come off again."""
    diffusion, t = GaussianDiffusion(linear_betas(1000)), torch.tensor([400])
    x_0, noise = torch.tensor([[[[0.5, -1.0]]]]), torch.tensor([[[[1.5, 0.3]]]])
    x_t, a = diffusion.q_sample(x_0, t, noise), diffusion.alpha_bar[400].item()
    back = answer(x_t, noise, a)
    if close(back * a**0.5, x_0):
        raise Wrong("too large by 1 / sqrt(alpha_bar): divided once too often?")
    if close(back, x_t - (1 - a) ** 0.5 * noise):
        raise Wrong(
            "the noise is gone, but the picture is still as faint as in x_t: divide by sqrt(alpha_bar)"
        )
    if not close(back, x_0):
        raise Wrong(f"of {x_0.flatten().tolist()} came back {back.flatten().tolist()}")


# -- 3. One step back, by Bayes' rule        topic: posterior; medium; 15 minutes


def posterior(x_0, x_t, beta_t, alpha_bar_t, alpha_bar_before):
    """Mean and variance of q(x_{t-1} | x_t, x_0); all arguments are numbers.

    Hint: of two Gaussians' product, 1 / variance is the sum of both 1 / variance; and the mean is each one's
    mean weighted by its share of that sum. Seen from x_{t-1}, x_t says "I came from x_t / sqrt(1 - beta_t)".
    """
    raise NotImplementedError


def check_posterior(answer=posterior):
    """Two densities multiplied on a grid."""
    beta, before, x_0, x_t = 0.02, 0.5, 0.9, -0.4
    grid = torch.linspace(-5, 5, 100_001, dtype=torch.float64)
    log_p = -((x_t - (1 - beta) ** 0.5 * grid) ** 2) / (2 * beta)
    log_p -= (grid - before**0.5 * x_0) ** 2 / (2 * (1 - before))
    p = log_p.softmax(0)
    mean = (p * grid).sum().item()
    variance = (p * (grid - mean) ** 2).sum().item()
    our_mean, our_variance = answer(x_0, x_t, beta, before * (1 - beta), before)
    if abs(our_variance - beta) < 1e-6:
        raise Wrong("the variance is beta_t, that of the step forward; who knows x_0 too is surer than that")
    if abs(our_variance - variance) > 1e-6:
        raise Wrong(f"the variance is {our_variance:.6f}; on the grid it is {variance:.6f}")
    if abs(our_mean - mean) > 1e-5:
        raise Wrong(f"the mean is {our_mean:.5f}; on the grid it is {mean:.5f}. Are the two weights swapped?")


# -- 4. Ancestral sampling        topic: sampling; medium; 20 minutes


def sample(diffusion, denoiser, x_T, generator):
    """Algorithm 2: from white noise x_T [N, C, H, W] to samples.

    diffusion: lesson 1's GaussianDiffusion, with `x_0_from_noise(x_t, t, eps_hat)`, `beta_tilde` [T] and
    `q_posterior_mean(x_0, x_t, t)`; t is int64 [N]. denoiser(x_t, t) guesses the noise; generator draws it.

    Hint: the last step adds none.
    """
    raise NotImplementedError


def check_sample(answer=sample):
    """An ideal denoiser of three pictures: whoever samples rightly ends on one of them."""
    diffusion, generator = GaussianDiffusion(linear_betas(200)), torch.Generator().manual_seed(0)
    pictures = torch.rand(3, 1, 4, 4, generator=generator) * 2 - 1

    def ideal(x_t, t):
        a = diffusion.alpha_bar[t].float().view(-1, 1)
        distance = torch.cdist(x_t.flatten(1), a[:1].sqrt() * pictures.flatten(1)).square()
        x_0 = (-distance / (2 * (1 - a))).softmax(1) @ pictures.flatten(1)
        return diffusion.noise_from_x_0(x_t, t, x_0.view_as(x_t))

    x_T = torch.randn(40, 1, 4, 4, generator=generator)
    samples = answer(diffusion, ideal, x_T, generator)
    # [40, 1, 16] - [3, 16]: cdist goes by products, and is off by more than the bound below on some CPUs
    distance, nearest = (samples.flatten(1)[:, None] - pictures.flatten(1)).norm(dim=2).min(1)
    if distance.max() > 0.5:
        found = f"a sample is {distance.max():.2f} away from all three pictures"
        raise Wrong(f"{found}: does t run from T - 1 down to 0? Is the noise's factor a standard deviation?")
    if distance.max() > 1e-3:
        raise Wrong(
            f"samples are {distance.max():.3f} away from the pictures: noise was added in the last step"
        )
    if len(nearest.unique()) < 3:
        raise Wrong("all samples are the same picture: is noise added in the steps between?")

    def at_two_steps(x_t, t):
        """Of a process of two steps, whose last guess is the x_t it is given."""
        return two.noise_from_x_0(x_t, t, torch.where((t == 0).view(-1, 1, 1, 1), x_t, 0.0))

    two = GaussianDiffusion(torch.tensor([0.02, 0.5], dtype=torch.float64))
    spread = answer(two, at_two_steps, torch.zeros(1, 1, 100, 100), generator).std().item()
    wanted = two.beta_tilde[1].sqrt().item()
    if abs(spread - wanted) > 0.1 * wanted:
        found = f"the noise of a step has the standard deviation {spread:.3f}"
        raise Wrong(f"{found}; it should be {wanted:.3f}, the root of beta_tilde")


CHECKS = [check_noisy, check_predicted_x_0, check_posterior, check_sample]

if __name__ == "__main__":
    run_checks(CHECKS)
