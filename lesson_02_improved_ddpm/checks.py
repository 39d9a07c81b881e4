"""What checks the reader's functions of improved_ddpm.ipynb, against independent values.

The checks of sections 5 to 7 are in `sampling_checks.py`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from common.exercises import WrongAnswer, allclose, expect_shape, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, fixed_large, linear_betas
from lesson_02_improved_ddpm.sampling_checks import ddim as ddim
from lesson_02_improved_ddpm.sampling_checks import ddim_step as ddim_step
from lesson_02_improved_ddpm.sampling_checks import family_sample as family_sample
from lesson_02_improved_ddpm.sampling_checks import learned_range as learned_range
from lesson_02_improved_ddpm.sampling_checks import loss_hybrid as loss_hybrid

DIFFUSION = GaussianDiffusion(linear_betas(1000))
SHORT = DIFFUSION.respace_evenly(25)  # here alpha_bar of t and of t - 1 differ clearly


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-9)


@numbered("2.1")
def respaced_betas(answer: Callable) -> None:
    """alpha_bar at the kept timesteps must not change."""
    kept = torch.tensor([0, 199, 499, 999])
    betas = answer(DIFFUSION.alpha_bar, kept)
    if isinstance(betas, Tensor) and betas.shape == (4,) and not betas.isfinite().all():
        raise WrongAnswer(
            "NaN or infinity: what is alpha_bar before the first kept timestep, on a clean image?"
        )
    if isinstance(betas, Tensor) and betas.shape == (3,):
        raise WrongAnswer(
            "The beta of the step to the first kept timestep is missing. What is alpha_bar before?"
        )
    expect_shape(betas, (4,))
    if same(betas, DIFFUSION.betas[kept]):
        raise WrongAnswer("These are the old betas. A longer step adds more noise: its beta must be larger.")
    old, wanted = DIFFUSION.alpha_bar, DIFFUSION.alpha_bar[kept]
    if same(betas, 1 - wanted):
        raise WrongAnswer("This is 1 - alpha_bar, the whole noise so far; beta is that of one step alone.")
    if same(betas, 1 - old[kept] / old[(kept - 1).clamp(min=0)]):
        raise WrongAnswer("alpha_bar is divided by that of t - 1. Which timestep came before in `kept`?")
    before = torch.cat([torch.ones(1).double(), wanted[:-1]])
    if same(betas, before - wanted):
        raise WrongAnswer("This is the difference of two successive values; 1 - beta is their ratio.")
    if (betas < 0).any():
        raise WrongAnswer(
            "A beta is negative. alpha_bar falls from one kept timestep to the next, and begins at 1."
        )
    alpha_bar = (1 - betas.double()).cumprod(0)
    if not same(alpha_bar, DIFFUSION.alpha_bar[kept]):
        worst = int((alpha_bar - DIFFUSION.alpha_bar[kept]).abs().argmax())
        raise WrongAnswer(
            f"At timestep {kept[worst]} the new process has alpha_bar {alpha_bar[worst]:.4f}, the old one "
            f"{DIFFUSION.alpha_bar[kept[worst]]:.4f}. The network would see the wrong noise level there."
        )


@numbered("2.2")
def cosine_betas(answer: Callable) -> None:
    """The product of 1 - beta must be the cosine curve itself."""
    betas = answer(1000)
    expect_shape(betas, (1000,))
    steps = torch.arange(1, 1001, dtype=torch.float64)
    curve = ((steps / 1000 + 0.008) / 1.008 * math.pi / 2).cos() ** 2
    curve = curve / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
    if torch.allclose(betas.double()[:900], 1 - curve[:900], atol=2e-3):
        raise WrongAnswer(
            "This is 1 - alpha_bar, the whole noise so far. The beta of one step follows from two successive "
            "values of alpha_bar (exercise 2.1)."
        )
    if (betas[:-1] < 0).all():
        raise WrongAnswer("The betas are negative: divide each g by the one before, not by the one after.")
    if (betas < 0).any():
        first = int((betas < 0).nonzero()[0])
        raise WrongAnswer(f"From t = {first} on g grows (beta < 0). Does the angle end at pi/2?")
    if betas[0] == 0:
        raise WrongAnswer("The first beta is 0: the curve is shifted by one step.")
    difference = -torch.cat([torch.ones(1).double(), curve]).diff()
    if torch.allclose(betas.double()[:900], difference[:900], atol=1e-6):
        raise WrongAnswer("This is the difference of two successive values; 1 - beta is their ratio.")
    if abs(betas.max().item() - 0.999) > 1e-6:
        raise WrongAnswer(
            f"The largest beta is {betas.max():.4f}, and 1 would erase the image: clip to 0.999."
        )
    if betas.dtype != torch.float64:
        raise WrongAnswer(f"The result has dtype {betas.dtype}; use float64, as for all tables.")
    alpha_bar = (1 - betas.double()).cumprod(0)
    for t in (0, 249, 499, 749):
        angle = ((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2
        wanted = math.cos(angle) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        if abs(alpha_bar[t].item() - wanted) > 1e-4:
            not_squared = abs(alpha_bar[t].item() ** 2 - wanted) < 1e-4
            hint = "Take the square of the cosine." if not_squared else "alpha_bar is g(t + 1) / g(0)."
            if abs(alpha_bar[t].item() - math.cos((t + 1) / 1000 * math.pi / 2) ** 2) < 1e-4:
                hint = "The offset 0.008 is missing."
            raise WrongAnswer(
                f"After step {t} alpha_bar is {alpha_bar[t]:.4f} and should be {wanted:.4f}. {hint}"
            )


@numbered("2.3")
def best_variance(answer: Callable) -> None:
    """Compare with Gaussian data, for which the variance of x_{t-1} given x_t is known."""
    cases = ((SHORT, 12, 0.5), (DIFFUSION, 500, 1.0), (DIFFUSION, 20, 0.5), (DIFFUSION, 2, 0.1))
    for process, i, s in cases:
        a, previous, beta = (float(x[i]) for x in (process.alpha_bar, process.alpha_bar_prev, process.betas))
        error = s**2 * (1 - a) / (a * s**2 + 1 - a)  # of the best x_0_hat for data of variance s^2
        variance = previous * s**2 + 1 - previous  # of x_{t-1}
        wanted = beta * variance / ((1 - beta) * variance + beta)
        result, small = answer(process, i, torch.tensor(error)), float(process.beta_tilde[i])
        expect_shape(torch.as_tensor(result), ())
        result, without = float(result), float(answer(process, i, torch.tensor(0.0)))
        c = float(process.posterior_mean_coef1[i])
        if abs(result / wanted - 1) < 1e-4:
            continue
        if abs(result / small - 1) < 1e-6:
            raise WrongAnswer("The error has no effect. With an uncertain x_0, x_{t-1} varies more.")
        if abs(result / wanted**0.5 - 1) < 1e-4:
            raise WrongAnswer("That is the standard deviation; return the variance.")
        if abs(result / math.log(wanted) - 1) < 1e-4:
            raise WrongAnswer("That is the logarithm; return the variance itself.")
        if abs(without) < 1e-9:
            raise WrongAnswer("With an error of 0 the variance must be beta_tilde: a part is missing.")
        if abs(without / small - 1) > 1e-4:
            raise WrongAnswer(
                f"With an error of 0 the variance must be beta_tilde = {small:.6f}, not {without:.6f}."
            )
        if abs(result / (small + c**2 * error**2) - 1) < 1e-4:
            raise WrongAnswer("`error` is a mean squared error already: square only the factor c.")
        if abs(result / (small + c**2 * a / previous * error) - 1) < 1e-4:
            raise WrongAnswer("The factor of x_0 in eq. 7 has alpha_bar of t - 1, not of t.")
        if abs(result / (small + error) - 1) < 1e-4:
            raise WrongAnswer(
                "An error of x_0_hat does not reach x_{t-1} as it is: which factor does x_0 have?"
            )
        if abs(result / (small + float(process.posterior_mean_coef2[i]) ** 2 * error) - 1) < 1e-4:
            raise WrongAnswer("That is the factor of x_t in eq. 7. x_t is known; which factor does x_0 have?")
        if abs(result / (small + c * error) - 1) < 1e-4:
            raise WrongAnswer("A factor c in front of x_0 multiplies the variance by c^2.")
        data = "white noise of variance 1" if s == 1 else f"Gaussian data of standard deviation {s}"
        raise WrongAnswer(f"For {data} the variance at i = {i} is {wanted:.6f}, not {result:.6f}.")


@numbered("2.4")
def normal_kl(answer: Callable) -> None:
    """Compare with the integral of q log(q / p) on a grid."""
    mean_1, var_1, mean_2, var_2 = 0.3, 0.5, -0.4, 1.2

    def log_density(x: Tensor, mean: float, variance: float) -> Tensor:
        return -((x - mean) ** 2) / (2 * variance) - 0.5 * math.log(2 * math.pi * variance)

    def integral(m_1: float, v_1: float, m_2: float, v_2: float) -> float:
        x = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
        q, p = log_density(x, m_1, v_1), log_density(x, m_2, v_2)
        return torch.trapezoid(q.exp() * (q - p), x).item()

    wanted, reverse = integral(mean_1, var_1, mean_2, var_2), integral(mean_2, var_2, mean_1, var_1)
    numbers = [torch.tensor(x) for x in (mean_1, math.log(var_1), mean_2, math.log(var_2))]
    pair = answer(*(x.expand(2) for x in numbers))
    if isinstance(pair, Tensor) and not pair.isfinite().all():
        raise WrongAnswer("NaN or infinity: the inputs are log variances already, so no logarithm is needed.")
    expect_shape(pair, (2,))
    result = float(pair[0])
    same_mean_and_variance = float(answer(*(numbers[i].expand(2) for i in (0, 1, 0, 1)))[0])
    if abs(same_mean_and_variance) > 1e-3:
        raise WrongAnswer(
            f"For two equal Gaussians the divergence is 0; your formula gives {same_mean_and_variance:.4f}."
        )
    if abs(result - reverse) < 1e-3:
        raise WrongAnswer("That is KL(N_2 || N_1), the reverse: the expectation is under the first Gaussian.")
    if abs(result - wanted / math.log(2)) < 1e-3:
        raise WrongAnswer("That is in bits; return nats here. The notebook divides by log 2 later.")
    if abs(result - 2 * wanted) < 1e-3:
        raise WrongAnswer("Twice too large: where is the 1/2 of the log density?")
    if abs(result - wanted) > 1e-3:
        same_mean = float(answer(*(numbers[i].expand(2) for i in (0, 1, 0, 3)))[0])
        wanted_same_mean = integral(mean_1, var_1, mean_1, var_2)
        if abs(same_mean - wanted_same_mean) > 1e-3:
            raise WrongAnswer(
                f"For two equal means the divergence is {wanted_same_mean:.4f}; your formula gives "
                f"{same_mean:.4f}. So the part with the variances is wrong: check its signs and its fraction."
            )
        raise WrongAnswer(
            f"The divergence is {wanted:.4f}; your formula gives {result:.4f}. For two equal means it is "
            "right. So the part with (m_1 - m_2)^2 is wrong: its factor, or the variance that divides it."
        )


@numbered("2.5")
def vlb_term(answer: Callable) -> None:
    """Compare with the divergence and the cumulative distribution of torch.distributions."""
    torch.manual_seed(0)
    x_0 = (torch.randint(256, (3, 1, 4, 4)) / 127.5 - 1).float()
    noise = torch.randn(3, 1, 4, 4)

    def result_and_parts(i: int) -> tuple[Tensor, Normal, Normal]:
        t, output = torch.full((3,), i), noise + 0.1 * noise.roll(1, 3)
        x_t = DIFFUSION.q_sample(x_0, t, noise)
        p = DIFFUSION.p_mean_variance(output, x_t, t, fixed_large)
        q_mean = DIFFUSION.q_posterior_mean(x_0, x_t, t).double()
        q = Normal(q_mean, (DIFFUSION.posterior_log_variance[i] / 2).exp())
        result = answer(DIFFUSION, output, x_0, x_t, i, fixed_large)
        if isinstance(result, Tensor) and not result.isfinite().all():
            raise WrongAnswer("NaN or infinity: normal_kl expects log variances.")
        expect_shape(result, (3, 1, 4, 4))
        return result, q, Normal(p.mean.double(), (p.log_variance.double() / 2).exp())

    def bits(nats: Tensor) -> Tensor:
        return nats / math.log(2)

    result, q, p = result_and_parts(3)
    wanted = bits(kl_divergence(q, p))
    plain = Normal(q.mean, (DIFFUSION.beta_tilde[3].float() / 2).exp().double())  # the variance as its log
    if allclose(result, bits(kl_divergence(p, q))):
        raise WrongAnswer("The divergence is reversed: q, the posterior, comes first.")
    if allclose(result, wanted * math.log(2)):
        raise WrongAnswer("The KL term is in nats: divide it by log 2.")
    if torch.allclose(result.double(), bits(kl_divergence(plain, p)), rtol=1e-3):
        raise WrongAnswer("normal_kl gets the variance beta_tilde as it is. Pass log variances.")
    if allclose(result, bits(kl_divergence(Normal(q.mean, p.stddev), p))):
        raise WrongAnswer("The variance of q is taken as beta_t. The posterior's variance is beta_tilde.")
    if not allclose(result, wanted):
        raise WrongAnswer(
            f"At i = 3 the first pixel has {wanted.flatten()[0]:.4f} bits, not {result.flatten()[0]:.4f}."
        )
    result, q, p = result_and_parts(400)
    if not allclose(result, bits(kl_divergence(q, p))):
        raise WrongAnswer("At i = 400 the value is wrong. Is x_0_hat clipped, as in the sampler?")
    result, q, p = result_and_parts(0)
    below = p.cdf((x_0 - 1 / 255).double()).masked_fill(x_0 < -0.999, 0)
    above = p.cdf((x_0 + 1 / 255).double()).masked_fill(x_0 > 0.999, 1)
    wanted = bits(-(above - below).clamp(min=1e-12).log())
    if allclose(result, bits(kl_divergence(q, p))):
        raise WrongAnswer("At i = 0 there is no KL term, but the cost of the gray values.")
    if torch.allclose(result.double(), wanted / math.log(2), rtol=1e-2):
        raise WrongAnswer("discretized_nll_bits is in bits already: only the KL is divided by log 2.")
    if not torch.allclose(result.double(), wanted, rtol=1e-2, atol=1e-3):
        raise WrongAnswer(
            f"At i = 0 the first pixel has {wanted.flatten()[0]:.4f} bits, not {result.flatten()[0]:.4f}."
        )
