"""What checks the reader's functions of improved_ddpm.ipynb, against independent values."""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from common.exercises import WrongAnswer, allclose, expect_shape, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, fixed_large, linear_betas
from lesson_02_improved_ddpm.variational_bound import loss_hybrid as reference_loss_hybrid

DIFFUSION = GaussianDiffusion(linear_betas(1000))


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-9)


@numbered("2.1")
def cosine_betas(answer: Callable) -> None:
    """The product of 1 - beta must be the cosine curve itself."""
    betas = answer(1000)
    expect_shape(betas, (1000,))
    if abs(betas.max().item() - 0.999) > 1e-6:
        raise WrongAnswer(
            f"The largest beta is {betas.max():.4f}, and 1 would erase the image: clamp to 0.999."
        )
    if betas.dtype != torch.float64:
        raise WrongAnswer(f"The result has dtype {betas.dtype}; use float64, as for all tables.")
    alpha_bar = (1 - betas.double()).cumprod(0)
    for t in (0, 249, 499, 749):
        angle = ((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2
        wanted = math.cos(angle) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        if abs(alpha_bar[t].item() - wanted) > 1e-4:
            not_squared = abs(alpha_bar[t].item() ** 2 - wanted) < 1e-4
            hint = "Take the square of the cosine." if not_squared else "alpha_bar is c(t) / c(0)."
            if abs(alpha_bar[t].item() - math.cos((t + 1) / 1000 * math.pi / 2) ** 2) < 1e-4:
                hint = "The offset 0.008 is missing."
            raise WrongAnswer(
                f"After step {t} alpha_bar is {alpha_bar[t]:.4f} and should be {wanted:.4f}. {hint}"
            )


@numbered("2.2")
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
    if abs(result - reverse) < 1e-3:
        raise WrongAnswer("That is KL(N_2 || N_1), the reverse: the expectation is under the first Gaussian.")
    if abs(result - wanted / math.log(2)) < 1e-3:
        raise WrongAnswer("That is in bits; return nats here. The notebook divides by log 2 later.")
    if abs(result - wanted) > 1e-3:
        raise WrongAnswer(f"The integral of q log(q / p) is {wanted:.4f}; your formula gives {result:.4f}.")


@numbered("2.3")
def vlb_term(answer: Callable) -> None:
    """Compare with the divergence and the cumulative distribution of torch.distributions."""
    torch.manual_seed(0)
    x_0 = (torch.randint(256, (3, 1, 4, 4)) / 127.5 - 1).float()
    noise, output = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)

    def result_and_parts(t: int) -> tuple[Tensor, Normal, Normal]:
        steps = torch.full((3,), t)
        x_t = DIFFUSION.q_sample(x_0, steps, noise)
        p = DIFFUSION.p_mean_variance(output, x_t, steps, fixed_large, denoised_fn=None)
        q_mean = DIFFUSION.q_posterior_mean(x_0, x_t, steps).double()
        q = Normal(q_mean, (DIFFUSION.posterior_log_variance[t] / 2).exp())
        result = answer(DIFFUSION, output, x_0, x_t, t, fixed_large)
        expect_shape(result, (3,))
        return result, q, Normal(p.mean.double(), (p.log_variance.double() / 2).exp())

    def bits(nats: Tensor) -> Tensor:
        return nats.flatten(1).mean(1) / math.log(2)

    result, q, p = result_and_parts(3)
    wanted = bits(kl_divergence(q, p))
    if allclose(result, bits(kl_divergence(p, q))):
        raise WrongAnswer("The divergence is reversed: q, the posterior, comes first.")
    if allclose(result, wanted * math.log(2)):
        raise WrongAnswer("The KL term is in nats: divide it by log 2.")
    if allclose(result, 16 * wanted):
        raise WrongAnswer("That is the sum over the pixels; bits per dimension are the mean.")
    if not allclose(result, wanted):
        raise WrongAnswer(f"At t = 3 the first image has {wanted[0]:.4f} bits/dim, not {result[0]:.4f}.")
    result, q, p = result_and_parts(400)
    if not allclose(result, bits(kl_divergence(q, p))):
        raise WrongAnswer("At t = 400 the value is wrong. Is clipping of x_0_hat off (denoised_fn=None)?")
    result, q, p = result_and_parts(0)
    below = p.cdf((x_0 - 1 / 255).double()).masked_fill(x_0 < -0.999, 0)
    above = p.cdf((x_0 + 1 / 255).double()).masked_fill(x_0 > 0.999, 1)
    wanted = bits(-(above - below).clamp(min=1e-12).log())
    if allclose(result, bits(kl_divergence(q, p))):
        raise WrongAnswer(
            "At t = 0 there is no KL term, but the cost of the gray values: discretized_nll_bits."
        )
    if torch.allclose(result.double(), wanted / math.log(2), rtol=1e-2):
        raise WrongAnswer("discretized_nll_bits is in bits already: only the KL is divided by log 2.")
    if not torch.allclose(result.double(), wanted, rtol=1e-2):
        raise WrongAnswer(f"At t = 0 the first image has {wanted[0]:.4f} bits/dim, not {result[0]:.4f}.")


@numbered("2.4")
def learned_log_variance(answer: Callable) -> None:
    """v = -1 and v = 1 are the two limits, and between them the logarithm is linear."""
    low, high = torch.tensor([-6.0]), torch.tensor([-4.0])
    results = [answer(torch.tensor([v]), low, high) for v in (-1.0, 0.0, 1.0)]
    for result in results:
        expect_shape(result, (1,))
    ends = [result.item() for result in results]
    if abs(ends[0] - -4) < 1e-5 and abs(ends[2] - -6) < 1e-5:
        raise WrongAnswer("The limits are swapped: v = 1 must give log beta, the larger one.")
    if abs(ends[0] - -8) < 1e-5 or abs(ends[2] - -4) > 1e-5 or abs(ends[0] - -6) > 1e-5:
        raise WrongAnswer(f"v = -1 gives {ends[0]:.2f} and v = 1 gives {ends[2]:.2f}; wanted are -6 and -4.")
    if abs(ends[1] - -5) > 1e-5:
        raise WrongAnswer("Interpolate the logarithms, not the variances: v = 0 must give -5 here.")


@numbered("2.5")
def loss_hybrid(answer: Callable) -> None:
    """The value, and which outputs the two parts of its gradient reach."""
    torch.manual_seed(0)
    x_0 = (torch.randint(256, (6, 1, 4, 4)) / 127.5 - 1).float()
    t, noise = torch.tensor([0, 10, 100, 400, 700, 999]), torch.randn(6, 1, 4, 4)
    output = torch.randn(6, 2, 4, 4, requires_grad=True)
    loss = answer(DIFFUSION, lambda x_t, t: output, x_0, t, noise)
    expect_shape(loss, (6,))
    simple = (output[:, :1] - noise).square().flatten(1).mean(1)
    wanted = reference_loss_hybrid(DIFFUSION, lambda x_t, t: output, x_0, t, noise)
    if allclose(loss, simple):
        raise WrongAnswer("The VLB is missing.")
    if allclose(loss, simple + (wanted - simple) / 1000):
        raise WrongAnswer("The VLB counts 1000 times too little: one term at a random t stands for all T.")
    if allclose(loss, simple + (wanted - simple) * 1000):
        raise WrongAnswer("The factor 0.001 of L_vlb is missing.")
    if not allclose(loss, wanted):
        raise WrongAnswer("The value is wrong. It is squared_error + 0.001 * T * vb_terms_bpd.")
    (gradient,) = torch.autograd.grad(loss.sum(), output, allow_unused=True)
    (of_simple,) = torch.autograd.grad(simple.sum(), output)
    if not gradient[:, 1:].any():
        raise WrongAnswer("v gets no gradient, so the variance cannot be learned: do not detach it.")
    if not torch.allclose(gradient[:, :1], of_simple[:, :1], rtol=1e-3, atol=1e-5):
        raise WrongAnswer("The VLB's gradient reaches eps_hat: detach eps_hat (and nothing else) in it.")


@numbered("2.6")
def respaced_betas(answer: Callable) -> None:
    """alpha_bar at the kept timesteps must not change."""
    kept = torch.tensor([0, 199, 499, 999])
    betas = answer(DIFFUSION.alpha_bar, kept)
    expect_shape(betas, (4,))
    if same(betas, DIFFUSION.betas[kept]):
        raise WrongAnswer("These are the old betas. A longer step adds more noise: its beta must be larger.")
    alpha_bar = (1 - betas.double()).cumprod(0)
    if not same(alpha_bar, DIFFUSION.alpha_bar[kept]):
        worst = int((alpha_bar - DIFFUSION.alpha_bar[kept]).abs().argmax())
        raise WrongAnswer(
            f"At timestep {kept[worst]} the new process has alpha_bar {alpha_bar[worst]:.4f}, the old one "
            f"{DIFFUSION.alpha_bar[kept[worst]]:.4f}. A beta is 1 - alpha_bar / (alpha_bar of the kept step "
            "before)."
        )


@numbered("2.7")
def ddim_step(answer: Callable) -> None:
    """With the true x_0 and noise, the step must have the marginal of the earlier timestep."""
    torch.manual_seed(0)
    x_0, noise, z = torch.rand(1, 1, 4, 4) * 2 - 1, torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    a = DIFFUSION.alpha_bar[300].item()
    result, noisy = answer(x_0, noise, a, 0.0), answer(z, noise, a, 0.3)
    expect_shape(result, (1, 1, 4, 4))
    if allclose(result, a * x_0 + (1 - a) * noise):
        raise WrongAnswer("The factors are the square roots of alpha_bar and 1 - alpha_bar.")
    if allclose(result, (1 - a) ** 0.5 * x_0 + a**0.5 * noise):
        raise WrongAnswer("Image and noise have each other's factor.")
    if allclose(result, a**0.5 * x_0):
        raise WrongAnswer("The noise is gone. The step goes to a lower noise level, not to the image.")
    if not allclose(result, DIFFUSION.q_sample(x_0, torch.tensor([300]), noise)):
        raise WrongAnswer("With the true image and noise and sigma = 0, the result must be q_sample.")
    if allclose(noisy, (1 - a) ** 0.5 * noise):
        raise WrongAnswer("sigma has no effect: the factor of eps_hat is sqrt(1 - alpha_bar_prev - sigma^2).")
    if not allclose(noisy, (1 - a - 0.09) ** 0.5 * noise):
        raise WrongAnswer("The variances must add up: that of eps_hat is 1 - alpha_bar_prev - sigma^2.")


@numbered("2.8")
def ddim(answer: Callable) -> None:
    """A network that is not sure: which timesteps it gets, and each step by hand."""
    process = DIFFUSION.respace_evenly(5)
    x_T, seen = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def network(x_t: Tensor, t: Tensor) -> Tensor:  # eps_hat and v
        if torch.is_grad_enabled():
            raise WrongAnswer("Gradients are on, so all steps stay in memory. Keep @torch.no_grad().")
        seen.append(int(t[0]))
        return torch.cat([0.7 * x_t.roll(1, 3), torch.ones_like(x_t)], 1)

    def by_hand(clip: bool = True, again: bool = True) -> Tensor:
        x = x_T
        for a, before in zip(process.alpha_bar.flip(0).tolist(), process.alpha_bar_prev.flip(0).tolist()):
            eps_hat = 0.7 * x.roll(1, 3)
            x_0 = (x - (1 - a) ** 0.5 * eps_hat) / a**0.5
            x_0 = x_0.clamp(-1, 1) if clip else x_0
            eps_hat = (x - a**0.5 * x_0) / (1 - a) ** 0.5 if again else eps_hat
            x = before**0.5 * x_0 + (1 - before) ** 0.5 * eps_hat
        return x

    torch.manual_seed(0)
    try:
        result = answer(network, process, x_T)
    except RuntimeError as error:
        if "must match the size" in str(error):
            raise WrongAnswer(
                "The network returns eps_hat and v. Take its first channel: [:, :1]."
            ) from error
        raise
    if seen in ([4, 3, 2, 1, 0], list(range(5))):
        raise WrongAnswer("The network gets the index, 0 to 4, not the timestep: use process.predict.")
    if seen == process.timesteps.tolist():
        raise WrongAnswer("The loop runs upwards; sampling goes from the last timestep down to 0.")
    if seen != process.timesteps.flip(0).tolist():
        raise WrongAnswer(f"The network got the timesteps {seen}, not {process.timesteps.flip(0).tolist()}.")
    expect_shape(result, (3, 1, 4, 4))
    if allclose(result, by_hand(clip=False)):
        raise WrongAnswer("x_0_hat is not clipped to [-1, 1].")
    if allclose(result, by_hand(again=False)):
        raise WrongAnswer("After clipping, eps_hat no longer belongs to x_0_hat: compute it again.")
    if not torch.equal(result, answer(network, process, x_T)):
        raise WrongAnswer("Two calls from the same noise differ, so the sampler adds noise. DDIM adds none.")
    if not allclose(result, by_hand()):
        raise WrongAnswer("The result is wrong. Does each step go to process.alpha_bar_prev[i]?")
