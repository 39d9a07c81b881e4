"""What checks the reader's functions of ddpm.ipynb that belong to sampling, against independent values."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributions import Normal

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas

DIFFUSION = GaussianDiffusion(linear_betas(1000))


def images(n: int = 4, seed: int = 0) -> Tensor:
    return torch.rand(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def white_noise(n: int = 4, seed: int = 1) -> Tensor:
    return torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


TIMESTEPS = torch.tensor([0, 100, 500, 999])


def at(table: Tensor, t: Tensor = TIMESTEPS) -> Tensor:
    return table[t].float().view(-1, 1, 1, 1)


@numbered("1.6")
def posterior_mean(answer: Callable) -> None:
    """Multiply the two densities on a grid, for one pixel."""
    t = torch.tensor([5])
    beta, before = DIFFUSION.betas[5], DIFFUSION.alpha_bar[4]
    x_0, x_t = 0.8, 0.7
    grid = torch.linspace(-4, 4, 80_001, dtype=torch.float64)
    log_p = -((x_t - (1 - beta).sqrt() * grid) ** 2) / (2 * beta)
    log_p -= (grid - before.sqrt() * x_0) ** 2 / (2 * (1 - before))
    expected = (log_p.softmax(0) * grid).sum().item()
    result = answer(torch.full((1, 1, 1, 1), x_0), torch.full((1, 1, 1, 1), x_t), t)
    expect_shape(result, (1, 1, 1, 1))
    swapped = DIFFUSION.q_posterior_mean(torch.full((1, 1, 1, 1), x_t), torch.full((1, 1, 1, 1), x_0), t)
    if abs(result.item() - swapped.item()) < 1e-5:
        raise WrongAnswer("The two weights are swapped: x_0 and x_t have each other's.")
    beta_now = DIFFUSION.alpha_bar[5].sqrt() * beta / (1 - DIFFUSION.alpha_bar[5]) * x_0
    kept = (1 - beta).sqrt() * (1 - DIFFUSION.alpha_bar[5]) / (1 - DIFFUSION.alpha_bar[5]) * x_t
    if abs(result.item() - (beta_now + kept).item()) < 1e-5:
        raise WrongAnswer("alpha_bar stands where alpha_bar_prev belongs: it is alpha_bar one step earlier.")
    if abs(result.item() - expected) > 1e-3:
        raise WrongAnswer(
            f"For x_0 = 0.8, x_t = 0.7 and t = 5 the product of the densities has its mean at "
            f"{expected:.4f}; your formula gives {result.item():.4f}."
        )
    t, one, zero = torch.tensor([50, 300, 700, 999]), torch.ones(4, 1, 1, 1), torch.zeros(4, 1, 1, 1)
    of_x_0 = DIFFUSION.q_posterior_mean(one, zero, t)
    found_0, root = answer(one, zero, t), at(DIFFUSION.alpha_bar_prev.sqrt(), t)
    if torch.allclose(found_0, of_x_0 * root, rtol=1e-3, atol=0):
        raise WrongAnswer("A root is missing: the factor of x_0 contains sqrt(alpha_bar_prev).")
    if torch.allclose(found_0, of_x_0 * at(DIFFUSION.alpha_bar.sqrt(), t) / root, rtol=1e-3, atol=0):
        raise WrongAnswer("The factor of x_0 has the root of alpha_bar_prev, not of alpha_bar.")
    if not torch.allclose(found_0, of_x_0, rtol=1e-3, atol=0):
        raise WrongAnswer(
            f"The factor of x_0 is wrong: at t = 50 it is {of_x_0[0].item():.4f}, and yours is "
            f"{found_0[0].item():.4f}."
        )
    of_x_t, found = DIFFUSION.q_posterior_mean(zero, one, t), answer(zero, one, t)
    if allclose(found, of_x_t * at((1 - DIFFUSION.betas).sqrt(), t)):
        raise WrongAnswer("A root is missing: the factor of x_t contains sqrt(alpha), not alpha = 1 - beta.")
    if not torch.allclose(found, of_x_t, rtol=1e-3):
        i = (found - of_x_t).abs().argmax()
        raise WrongAnswer(
            f"The factor of x_t is wrong: at t = {t[i]} it is {of_x_t.flatten()[i]:.4f}, and yours is "
            f"{found.flatten()[i]:.4f}."
        )
    first = answer(images(), white_noise(), torch.zeros(4, dtype=torch.int64))
    if not first.isfinite().all():
        raise WrongAnswer(
            "At t = 0 the result is not a number: the formula above the exercise divides by "
            "1 - alpha_bar_prev, which is 0 there. Insert beta_tilde and simplify first."
        )
    if not torch.allclose(first, images(), atol=1e-4):
        raise WrongAnswer("At t = 0 the mean is x_0 itself: alpha_bar before the first step is 1.")


def check_mean(x_prev: Tensor, x_0: Tensor) -> None:
    """Raise WrongAnswer unless x_prev, a step from t = 5, depends on x_0 and x_t as the posterior mean does.

    The noise of the step does not matter, because the slopes are fitted to all pixels. x_t must have been
    made from x_0 with `white_noise`.
    """
    x_t = DIFFUSION.q_sample(x_0, torch.full((len(x_0),), 5), white_noise(len(x_0)))
    inputs = torch.stack([x_0.flatten(), x_t.flatten()], 1).double()
    found = torch.linalg.lstsq(inputs, x_prev.reshape(-1, 1).double()).solution.flatten()
    wanted = torch.stack([DIFFUSION.posterior_mean_coef1[5], DIFFUSION.posterior_mean_coef2[5]])
    if (found - wanted).abs().max() < 0.04:
        return
    numbers = f"{found[0]:.2f} x_0_hat + {found[1]:.2f} x_t"
    for pattern, hint in (
        (wanted.flip(0), "The arguments are swapped: call posterior_mean(x_0_hat, x_t, ...)."),
        (torch.tensor([1.0, 0.0]), "Take the posterior mean of x_0_hat and x_t, not x_0_hat itself."),
        (torch.tensor([0.0, 1.0]), "Take the posterior mean of x_0_hat and x_t, not x_t itself."),
    ):
        if (found - pattern).abs().max() < 0.04:
            raise WrongAnswer(f"The mean is wrong: at t = 5 it is {numbers}. {hint}")
    raise WrongAnswer(
        f"The mean is wrong: at t = 5 it is {numbers}; the posterior mean is {wanted[0]:.2f} x_0_hat + "
        f"{wanted[1]:.2f} x_t."
    )


@numbered("1.7, one step")
def reverse_step(answer: Callable) -> None:
    """A denoiser that knows x_0: the step is the posterior, and the chain ends on x_0."""
    x_0, seen = images(200), []

    def knows_x_0(x_t: Tensor, t: Tensor | int) -> Tensor:
        if not isinstance(t, Tensor) or t.shape != (len(x_t),):
            raise WrongAnswer("The network needs one t per image, as a tensor: torch.full((len(x_t),), t).")
        seen.append(int(t[0]))
        return DIFFUSION.noise_from_x_0(x_t, t, x_0)

    torch.manual_seed(0)
    with torch.no_grad():
        for step in (1, 998):
            seen.clear()
            answer(knows_x_0, white_noise(200), step)
            if seen and seen[0] != step:
                found = f"In the step at t = {step} the network was given t = {seen[0]}"
                raise WrongAnswer(f"{found}. It takes the same t as the tables.")
        t = torch.zeros(200, dtype=torch.int64)
        x_t = x_first = DIFFUSION.q_sample(x_0, t, white_noise(200))
        last = answer(knows_x_0, x_t, 0)
        expect_shape(last, (200, 1, 8, 8))
        if allclose(last, knows_x_0(x_t, t)):
            raise WrongAnswer("That is the predicted noise. Compute x_0_hat, then the posterior mean.")
        if allclose(last, knows_x_0(x_t, t).clamp(-1, 1)):
            raise WrongAnswer("The network's output is noise, not x_0: pass it through x_0_from_noise.")
        check_mean(answer(knows_x_0, DIFFUSION.q_sample(x_0, t + 5, white_noise(200)), 5), x_0)
        t = torch.full((200,), 300)
        x_t = DIFFUSION.q_sample(x_0, t, white_noise(200))
        expected = DIFFUSION.q_posterior_mean(x_0, x_t, t)
        x_prev = answer(knows_x_0, x_t, 300)
        spread, sigma = (x_prev - expected).std().item(), DIFFUSION.beta_tilde[300].sqrt().item()
        if x_prev.abs().max() < 1.001 and spread > 1.5 * sigma:
            raise WrongAnswer("Only the predicted x_0 is clipped, not x_{t-1}, which contains noise.")
        if (x_prev - expected).std((1, 2, 3)).max() < 1e-4 < (x_prev - expected).abs().max():
            raise WrongAnswer("All pixels of an image get the same noise: use torch.randn_like(x_t).")
        if spread < 1e-4:
            raise WrongAnswer("It adds no noise: at t > 0 add noise of standard deviation sqrt(beta_tilde).")
        if abs(spread - sigma**2) < 0.05 * sigma**2:
            raise WrongAnswer("The noise is multiplied by the variance; take the standard deviation.")
        if abs(spread / sigma - 1) > 0.05:
            raise WrongAnswer(f"At t = 300 the noise has standard deviation {spread:.4f}, not {sigma:.4f}.")
        if allclose(answer(knows_x_0, x_t, 1), answer(knows_x_0, x_t, 1)):
            raise WrongAnswer("No noise at t = 1. Only t = 0 goes without: the paper's t > 1 is our t > 0.")
        off = (last - x_0).abs().max().item()
        if off > 1e-3:
            raise WrongAnswer(f"At t = 0 the result is off by {off:.3f}. Is noise added in the last step?")
        beyond = answer(lambda x, t: DIFFUSION.noise_from_x_0(x, t, 3 * x_0), x_first, 0)
        if beyond.abs().max() > 1.001:
            raise WrongAnswer("A predicted x_0 outside [-1, 1] is not clipped.")
        t = torch.full((200,), 5)
        x_t = DIFFUSION.q_sample(x_0, t, white_noise(200))
        spread = (answer(knows_x_0, x_t, 5) - DIFFUSION.q_posterior_mean(x_0, x_t, t)).std().item()
        if abs(spread / DIFFUSION.beta_tilde[5].sqrt().item() - 1) > 0.05:
            raise WrongAnswer(
                f"At t = 5 the added noise has variance {spread**2:.6f}. beta_tilde is "
                f"{DIFFUSION.beta_tilde[5]:.6f} there, and beta is {DIFFUSION.betas[5]:.6f}."
            )


@numbered("1.7, the loop")
def sample(answer: Callable) -> None:
    """A denoiser that knows the image: which timesteps it is asked for, and where the chain ends."""
    image, seen, inputs = images(1)[:, :, :1, :1].expand(3, 1, 32, 32), [], []

    def knows_x_0(x_t: Tensor, t: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise WrongAnswer(
                "Gradients are on, so all thousand steps stay in memory. Keep @torch.no_grad()."
            )
        seen.append(int(t[0]))
        inputs.append(x_t)
        return DIFFUSION.noise_from_x_0(x_t, t, image)

    torch.manual_seed(0)
    try:
        result = answer(knows_x_0, 3)
    except IndexError:
        raise WrongAnswer(
            "A timestep is out of range. The paper counts t from 1000 to 1, our tables from 999 to 0."
        ) from None
    if seen == list(range(1000)):
        raise WrongAnswer("The loop runs from t = 0 upwards. Sampling starts at t = 999 and ends at 0.")
    if seen != list(range(999, -1, -1)):
        first, last = (seen[0], seen[-1]) if seen else ("-", "-")
        raise WrongAnswer(
            f"The network got {len(seen)} timesteps, from {first} to {last}; 999 to 0 is right."
        )
    expect_shape(result, (3, 1, 32, 32))
    if abs(inputs[0].std().item() - 1) > 0.1 or abs(inputs[0].mean().item()) > 0.1:
        raise WrongAnswer("The chain does not start from white noise: use torch.randn.")
    if all(torch.equal(inputs[0], x_t) for x_t in inputs):
        raise WrongAnswer(
            "Every step starts from the same noise: the result of a step is the next one's x_t."
        )
    if not torch.allclose(result, image, atol=1e-3):
        raise WrongAnswer("With a network that knows the image, the loop must end on that image.")


@numbered("1.10")
def ideal_denoiser(answer: Callable) -> None:
    """Compare with Bayes' rule, written with the log densities of torch.distributions."""
    data, t = 0.1 * images(3), torch.tensor([100, 300])  # so faint that no weight is 0 or 1
    x_t = DIFFUSION.q_sample(data[:2], t, white_noise(2))
    a = DIFFUSION.alpha_bar[t].view(-1, 1, 1, 1, 1)

    def noise_of(log_weights: Tensor) -> Tensor:
        x_0 = torch.einsum("nm,mchw->nchw", log_weights.softmax(1), data.double())
        return DIFFUSION.noise_from_x_0(x_t.double(), t, x_0)

    per_pixel = Normal(a.sqrt() * data, (1 - a).sqrt()).log_prob(x_t[:, None].double())
    log_weights = per_pixel.sum((2, 3, 4))
    unscaled = Normal(data.double(), (1 - a).sqrt()).log_prob(x_t[:, None].double()).sum((2, 3, 4))
    wanted = noise_of(log_weights)
    with explaining("must match the size", "All pairs of an x_t and an image: write x_t[:, None] - data."):
        result = answer(data, x_t, t)
    expect_shape(result, (2, 1, 8, 8))
    if allclose(result, DIFFUSION.x_0_from_noise(x_t.double(), t, wanted)):
        raise WrongAnswer("That is the predicted x_0. Return the noise that belongs to it, by eq. 4.")
    if allclose(result, noise_of(unscaled)):
        raise WrongAnswer("In x_t the images are fainter: compare x_t with sqrt(alpha_bar) times each image.")
    if allclose(result, noise_of(2 * log_weights)):
        raise WrongAnswer("The exponent is off by a factor 2: divide the distance by 2 (1 - alpha_bar).")
    if allclose(result, noise_of(per_pixel.mean((2, 3, 4)))):
        raise WrongAnswer("The squared distance is a sum over pixels, not a mean.")
    if allclose(result, noise_of(log_weights * (1 - a.view(2, 1)).sqrt())):
        raise WrongAnswer("You divide by the standard deviation. The exponent divides by the variance.")
    if allclose(result, noise_of(-log_weights)):
        raise WrongAnswer("The sign is wrong: the nearest image must get the largest weight.")
    if allclose(result, noise_of(torch.zeros(2, 3).double())):
        raise WrongAnswer("All images get the same weight; it should depend on their distance to x_t.")
    a = a.view(2, 1, 1, 1)
    if allclose((x_t - (1 - a) * result) / a.sqrt(), DIFFUSION.x_0_from_noise(x_t.double(), t, wanted)):
        raise WrongAnswer("The last line divides by 1 - alpha_bar. By eq. 4 it is the root of that.")
    nearest = data[log_weights.argmax(1)].double()
    if allclose(result, DIFFUSION.noise_from_x_0(x_t.double(), t, nearest)):
        raise WrongAnswer("That is the noise of the nearest image. Average all images with their weights.")
    if not allclose(result, wanted):
        raise WrongAnswer("The result is not Bayes' rule. Is the softmax taken over the images of the data?")
