"""What checks the reader's learned variance, loss and samplers (exercises 2.6 to 2.10)."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_02_improved_ddpm.solutions import family_sample as reference_family_sample
from lesson_02_improved_ddpm.variational_bound import loss_hybrid as reference_loss_hybrid

DIFFUSION = GaussianDiffusion(linear_betas(1000))


@numbered("2.6")
def learned_range(answer: Callable) -> None:
    """v = -1, 0 and 1 must give the small variance, the geometric mean and the large one."""
    torch.manual_seed(0)
    t, x_t, eps_hat = torch.tensor([0, 10, 400]), torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4)
    low, high = (
        DIFFUSION.extract(table, t, x_t).expand_as(x_t)
        for table in (DIFFUSION.posterior_log_variance, DIFFUSION.log_betas)
    )

    def at(v: float) -> Tensor:
        result = answer(DIFFUSION, torch.cat([eps_hat, torch.full_like(eps_hat, v)], 1), x_t, t)
        if isinstance(result, Tensor) and not result.isfinite().all():
            raise WrongAnswer(
                "NaN or infinity. Take both limits from the tables, which hold logarithms already "
                "(beta_tilde is 0 at t = 0)."
            )
        if isinstance(result, Tensor) and result.shape == (3, 3, 4, 4):
            raise WrongAnswer("It returns the shape (3, 3, 4, 4). Keep the channel axis: output[:, 1:].")
        expect_shape(result, (3, 1, 4, 4))
        return result

    small, middle, large = at(-1.0), at(0.0), at(1.0)
    if torch.equal(small, large):
        raise WrongAnswer("v has no effect. v is the second channel; the first is eps_hat.")
    if allclose(small, high) and allclose(large, low):
        raise WrongAnswer("The limits are swapped: v = 1 gives the large variance, beta.")
    if allclose(middle, low) and allclose(large, high):
        raise WrongAnswer("v lies between -1 and 1, and f between 0 and 1: f = (v + 1) / 2.")
    if torch.allclose(large, high.exp(), rtol=1e-3, atol=1e-9):
        raise WrongAnswer("That is the variance; return its logarithm.")
    if allclose(small, low) and allclose(large, high):
        if not allclose(middle, (low + high) / 2):
            raise WrongAnswer("Interpolate the logarithms, not the variances or standard deviations.")
        if allclose(at(-5.0), low):
            raise WrongAnswer("v is clipped. Leave it as it is: the network may leave the limits.")
        return
    raise WrongAnswer(
        f"At t = 10, v = -1 gives {small[1].mean():.3f} and should give log beta_tilde = "
        f"{low[1].mean():.3f}; v = 1 gives {large[1].mean():.3f} and should give "
        f"log beta = {high[1].mean():.3f}."
    )


@numbered("2.7")
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

    def gradient_of(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss.sum(), output, retain_graph=True)[0]

    if allclose(loss, simple):
        if gradient_of(loss)[:, 1:].any():
            raise WrongAnswer("The weight of the VLB is far too small: T multiplies the drawn term.")
        raise WrongAnswer("The VLB is missing.")
    if allclose(loss, wanted - simple):
        raise WrongAnswer("L_simple is missing: this is only the VLB.")
    if allclose(loss, simple + (wanted - simple) / 1000):
        raise WrongAnswer(
            "The weight of the VLB is 1000 times too small: one random term stands for a sum of T terms."
        )
    if allclose(loss, simple + (wanted - simple) * 1000):
        raise WrongAnswer(
            "The weight of the VLB is 1000 times too large: the factor 0.001 of L_vlb is missing."
        )
    if allclose(loss, reference_loss_hybrid(DIFFUSION, lambda x_t, t: output.flip(1), x_0, t, noise)):
        raise WrongAnswer("The outputs are swapped: the first channel is eps_hat, the second v.")
    swapped = torch.cat([output[:, 1:], output[:, :1]], 1).detach()
    swapped_vlb = reference_loss_hybrid(DIFFUSION, lambda x_t, t: swapped, x_0, t, noise) - (
        swapped[:, :1] - noise
    ).square().flatten(1).mean(1)
    if allclose(loss, simple + swapped_vlb):
        raise WrongAnswer("The outputs are swapped in the VLB: the first channel is eps_hat, the second v.")
    if not allclose(loss, wanted):
        excess, right = (float((x - simple.detach())[1]) for x in (loss.detach(), wanted.detach()))
        raise WrongAnswer(
            f"At t = 10 the loss exceeds L_simple by {excess:.4f} and should by {right:.4f}. "
            "How many terms does the sum have, and what is its weight?"
        )
    gradient, of_simple = gradient_of(loss), gradient_of(simple)
    if not gradient[:, 1:].any():
        raise WrongAnswer("v gets no gradient, so the variance cannot be learned: do not detach it.")
    if not gradient[:, :1].any():
        raise WrongAnswer("eps_hat gets no gradient at all: detach it in the VLB term, not in L_simple.")
    if not torch.allclose(gradient[:, :1], of_simple[:, :1], rtol=1e-3, atol=1e-5):
        raise WrongAnswer("The VLB's gradient reaches eps_hat: detach eps_hat (and nothing else) in it.")
    seen: list[int] = []

    def network(x_t: Tensor, t: Tensor) -> Tensor:
        seen.extend(t.tolist())
        return output

    process = DIFFUSION.respace_evenly(10)
    indices = torch.tensor([0, 1, 3, 5, 7, 9])
    short = answer(process, network, x_0, indices, noise)
    if seen != process.timesteps[indices].tolist():
        raise WrongAnswer(
            "In a respaced process the network gets the index, not the timestep: use process.predict."
        )
    if not allclose(short, reference_loss_hybrid(process, network, x_0, indices, noise)):
        raise WrongAnswer(
            "In a process of 10 steps the drawn term stands for a sum of 10 terms: its factor is "
            "0.001 * process.num_timesteps."
        )


@numbered("2.8")
def ddim_step(answer: Callable) -> None:
    """With the true x_0 and noise, the step must have the marginal of the earlier timestep."""
    torch.manual_seed(0)
    x_0, noise, z = torch.rand(1, 1, 4, 4) * 2 - 1, torch.randn(1, 1, 4, 4), torch.zeros(1, 1, 4, 4)
    a = DIFFUSION.alpha_bar[300].item()
    result, noisy = answer(x_0, noise, a, 0.0), answer(z, noise, a, 0.3)
    expect_shape(result, (1, 1, 4, 4))
    if not allclose(noisy, answer(z, noise, a, 0.3)):
        raise WrongAnswer("Two calls differ. Return the step without the added noise sigma z.")
    if allclose(result, a * x_0 + (1 - a) * noise):
        raise WrongAnswer("The factors are the square roots of alpha_bar and 1 - alpha_bar.")
    if allclose(result, (1 - a) ** 0.5 * x_0 + a**0.5 * noise):
        raise WrongAnswer("Image and noise have each other's factor.")
    if allclose(result, a**0.5 * x_0):
        raise WrongAnswer("The noise is gone. The step goes to a lower noise level, not to the image.")
    if not allclose(result, DIFFUSION.q_sample(x_0, torch.tensor([300]), noise)):
        raise WrongAnswer("With the true image and noise and sigma = 0, the result must be q_sample.")
    if allclose(noisy, (1 - a) ** 0.5 * noise):
        raise WrongAnswer(
            "sigma has no effect. With the added noise sigma z, the total variance is too large by sigma^2."
        )
    if not allclose(noisy, (1 - a - 0.09) ** 0.5 * noise):
        total = float((noisy / noise).square().mean()) + 0.09
        raise WrongAnswer(
            f"For sigma = 0.3 the variances of both noises add up to {total:.3f} and not to {1 - a:.3f}."
        )


@numbered("2.9")
def ddim(answer: Callable) -> None:
    """A network that is not sure: which timesteps it gets, and each step by hand."""
    process = DIFFUSION.respace_evenly(5)
    x_T, seen = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []

    def network(x_t: Tensor, t: Tensor) -> Tensor:  # eps_hat and v
        if torch.is_grad_enabled():
            raise WrongAnswer("Gradients are on, so all steps stay in memory. Keep @torch.no_grad().")
        seen.append(int(t[0]))
        return torch.cat([0.7 * x_t.roll(1, 3), torch.ones_like(x_t)], 1)

    def by_hand(clamp: bool = True, again: bool = True) -> Tensor:
        x = x_T
        for a, before in zip(process.alpha_bar.flip(0).tolist(), process.alpha_bar_prev.flip(0).tolist()):
            eps_hat = 0.7 * x.roll(1, 3)
            x_0 = (x - (1 - a) ** 0.5 * eps_hat) / a**0.5
            x_0 = x_0.clamp(-1, 1) if clamp else x_0
            eps_hat = (x - a**0.5 * x_0) / (1 - a) ** 0.5 if again else eps_hat
            x = before**0.5 * x_0 + (1 - before) ** 0.5 * eps_hat
        return x

    torch.manual_seed(0)
    with explaining(
        "must match the size", "The network returns eps_hat and v. Take its first channel: [:, :1]."
    ):
        result = answer(process, network, x_T)
    if seen in ([4, 3, 2, 1, 0], list(range(5))):
        raise WrongAnswer("The network gets the index, 0 to 4, not the timestep: use process.predict.")
    if seen == process.timesteps.tolist():
        raise WrongAnswer("The loop runs upwards; sampling goes from the last timestep down to 0.")
    if seen != process.timesteps.flip(0).tolist():
        raise WrongAnswer(f"The network got the timesteps {seen}, not {process.timesteps.flip(0).tolist()}.")
    expect_shape(result, (3, 1, 4, 4))
    if allclose(result, by_hand(clamp=False)):
        raise WrongAnswer("x_0_hat is not clipped to [-1, 1].")
    if allclose(result, by_hand(again=False)):
        raise WrongAnswer("After clipping, eps_hat no longer belongs to x_0_hat: compute it again.")
    if not torch.equal(result, answer(process, network, x_T)):
        raise WrongAnswer("Two calls from the same noise differ, so the sampler adds noise. DDIM adds none.")
    if not allclose(result, by_hand()):
        raise WrongAnswer("The result is wrong. Does each step go to process.alpha_bar_prev[i]?")


@numbered("2.10")
def family_sample(answer: Callable) -> None:
    """Gaussian data with the ideal denoiser: which timesteps it gets, and how noisy the samples are."""
    process, data_std = DIFFUSION.respace_evenly(25), 0.2
    x_T = torch.randn(10_000, 1, 2, 2, generator=torch.Generator().manual_seed(0))

    def std_and_timesteps(sampler: Callable, knows_index: bool) -> tuple[float, list[int]]:
        seen: list[int] = []

        def network(x_t: Tensor, t: Tensor) -> Tensor:  # the ideal eps_hat, and v
            seen.append(int(t[0]))
            timestep = process.timesteps[process.num_timesteps - len(seen)] if knows_index else t[0]
            a = float(DIFFUSION.alpha_bar[int(timestep)])
            eps_hat = (1 - a) ** 0.5 / (a * data_std**2 + 1 - a) * x_t
            return torch.cat([eps_hat, torch.ones_like(x_t)], 1)

        torch.manual_seed(0)
        samples = sampler(process, network, x_T, 0.5)
        expect_shape(samples, (10_000, 1, 2, 2))
        return float(samples.std()), seen

    std, seen = std_and_timesteps(answer, knows_index=False)
    wrong_timesteps = seen != process.timesteps.flip(0).tolist()
    wanted, _ = std_and_timesteps(reference_family_sample, knows_index=True)
    got, _ = std_and_timesteps(answer, knows_index=True)
    wrong_noise = abs(got / wanted - 1) > 0.02

    def one_call(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return answer(process, lambda x_t, t: torch.cat([x_t, x_t], 1), x_T[:8], 1.0)

    if torch.equal(one_call(0), one_call(1)):
        raise WrongAnswer(
            "For eta = 1 two calls agree: your sampler adds no noise. Keep sigma z, and correct what stands "
            "next to it."
        )
    if wrong_timesteps and wrong_noise:
        raise WrongAnswer(
            "Both bugs are left. With the ideal denoiser for data of standard deviation "
            f"{data_std}, the samples have {std:.2f}."
        )
    if wrong_timesteps:
        raise WrongAnswer(f"One bug is left. Print the timesteps that the network gets: {seen[:3]} ...")
    if wrong_noise:
        raise WrongAnswer(
            f"One bug is left. Samples of data of standard deviation {data_std} have {got:.2f}. Add up the "
            "variances of the noises in x."
        )
