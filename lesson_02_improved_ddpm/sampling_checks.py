"""What checks the reader's samplers of improved_ddpm.ipynb (exercises 2.7 to 2.9)."""

from collections.abc import Callable

import torch
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas
from lesson_02_improved_ddpm.solutions import family_sample as reference_family_sample

DIFFUSION = GaussianDiffusion(linear_betas(1000))


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
        raise WrongAnswer(
            "sigma has no effect. With the added noise sigma z, the total variance is too large by sigma^2."
        )
    if not allclose(noisy, (1 - a - 0.09) ** 0.5 * noise):
        total = float((noisy / noise).square().mean()) + 0.09
        raise WrongAnswer(
            f"For sigma = 0.3 the variances of both noises add up to {total:.3f} and should to {1 - a:.3f}."
        )


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
    if allclose(result, by_hand(clip=False)):
        raise WrongAnswer("x_0_hat is not clipped to [-1, 1].")
    if allclose(result, by_hand(again=False)):
        raise WrongAnswer("After clipping, eps_hat no longer belongs to x_0_hat: compute it again.")
    if not torch.equal(result, answer(process, network, x_T)):
        raise WrongAnswer("Two calls from the same noise differ, so the sampler adds noise. DDIM adds none.")
    if not allclose(result, by_hand()):
        raise WrongAnswer("The result is wrong. Does each step go to process.alpha_bar_prev[i]?")


@numbered("2.9")
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
