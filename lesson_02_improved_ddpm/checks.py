"""What checks the reader's functions of improved_ddpm.ipynb, against independent values."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_02_improved_ddpm.variational_bound import loss_hybrid as reference_loss_hybrid

DIFFUSION = GaussianDiffusion(linear_betas(1000))


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=1e-6, atol=1e-9)


@numbered("2.1")
def cosine_betas(answer: Callable) -> None:
    """The product of 1 - beta must be the cosine curve itself."""
    betas = answer(1000)
    expect_shape(betas, (1000,))
    if betas.max() <= 0:
        raise WrongAnswer("The betas are not positive. Is the ratio upside down? It is c(t + 1) / c(t).")
    if betas.max() >= 1:
        raise WrongAnswer("The last beta is 1, so the last step would erase the image: clamp to 0.999.")
    if abs(betas.max().item() - 0.999) > 1e-6:
        raise WrongAnswer(f"The largest beta is {betas.max():.4f}; the paper clips at 0.999.")
    if betas.dtype != torch.float64:
        raise WrongAnswer(f"The result has dtype {betas.dtype}; use float64, as for all tables.")
    alpha_bar = (1 - betas.double()).cumprod(0)
    for t in (0, 249, 499, 749):
        angle = ((t + 1) / 1000 + 0.008) / 1.008 * math.pi / 2
        wanted = math.cos(angle) ** 2 / math.cos(0.008 / 1.008 * math.pi / 2) ** 2
        if abs(alpha_bar[t].item() - wanted) > 1e-4:
            not_squared = abs(alpha_bar[t].item() ** 2 - wanted) < 1e-4
            hint = "Take the square of the cosine." if not_squared else "alpha_bar is c(t) / c(0)."
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
    expect_shape(pair, (2,))
    result = float(pair[0])
    if abs(result - reverse) < 1e-3:
        raise WrongAnswer("That is KL(N_2 || N_1), the reverse: the expectation is under the first Gaussian.")
    if abs(result - wanted / math.log(2)) < 1e-3:
        raise WrongAnswer("That is in bits; return nats here. The notebook divides by log 2 later.")
    if abs(result - wanted) > 1e-3:
        raise WrongAnswer(f"The integral of q log(q / p) is {wanted:.4f}; your formula gives {result:.4f}.")


@numbered("2.3")
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


@numbered("2.4")
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
        raise WrongAnswer("The variational bound is missing.")
    if allclose(loss, simple + (wanted - simple) / 1000):
        raise WrongAnswer(
            "The bound counts 1000 times too little: one term at a random t stands for all T terms."
        )
    if allclose(loss, simple + (wanted - simple) * 1000):
        raise WrongAnswer("The factor 0.001 of L_vlb is missing.")
    if not allclose(loss, wanted):
        raise WrongAnswer("The value is wrong. It is squared_error + 0.001 * T * vb_terms_bpd.")
    (gradient,) = torch.autograd.grad(loss.sum(), output, allow_unused=True)
    (of_simple,) = torch.autograd.grad(simple.sum(), output)
    if not gradient[:, 1:].any():
        raise WrongAnswer("v gets no gradient, so the variance cannot be learned: do not detach it.")
    if not torch.allclose(gradient[:, :1], of_simple[:, :1], rtol=1e-3, atol=1e-5):
        raise WrongAnswer("The bound's gradient reaches eps_hat: detach eps_hat (and nothing else) in it.")


@numbered("2.5")
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


@numbered("2.6")
def ddim_step(answer: Callable) -> None:
    """With the true x_0 and noise the step must land on q_sample of the earlier timestep."""
    torch.manual_seed(0)
    x_0, noise = torch.rand(1, 1, 4, 4) * 2 - 1, torch.randn(1, 1, 4, 4)
    alpha_bar = DIFFUSION.alpha_bar[300].item()
    wanted = DIFFUSION.q_sample(x_0, torch.tensor([300]), noise)
    result = answer(x_0, noise, alpha_bar)
    expect_shape(result, (1, 1, 4, 4))
    if allclose(result, alpha_bar * x_0 + (1 - alpha_bar) * noise):
        raise WrongAnswer("The factors are the square roots of alpha_bar and 1 - alpha_bar.")
    if allclose(result, (1 - alpha_bar) ** 0.5 * x_0 + alpha_bar**0.5 * noise):
        raise WrongAnswer("Image and noise have each other's factor.")
    if allclose(result, alpha_bar**0.5 * x_0):
        raise WrongAnswer(
            "The noise is gone. DDIM keeps it: it goes to a lower noise level, not to the image."
        )
    if not allclose(result, wanted):
        raise WrongAnswer(
            "With the true image and noise, the result must be q_sample at the earlier timestep."
        )
