"""What checks the reader's functions of ddpm.ipynb that belong to training."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.exercises import WrongAnswer, explaining, numbered
from lesson_01_ddpm.sampling_checks import DIFFUSION, images


@numbered("1.4")
def loss_fn(answer: Callable) -> None:
    """Networks whose loss is known: one that predicts zero, and one that knows x_0."""
    torch.manual_seed(0)
    x_0, seen, weight = images(256), [], torch.zeros(1, requires_grad=True)

    def predicts_zero(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        return weight * x_t

    def knows_the_noise(x_t: Tensor, t: Tensor) -> Tensor:
        return DIFFUSION.noise_from_x_0(x_t, t, x_0)

    try:
        loss = answer(predicts_zero, x_0)
    except IndexError:
        raise WrongAnswer(
            "A timestep is out of range. The paper counts t from 1 to 1000, our tables from 0 to 999."
        ) from None
    if isinstance(loss, float):
        raise WrongAnswer("Return a tensor, not a Python number: training needs its gradient.")
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise WrongAnswer("Return a single number: the mean over all images and pixels.")
    if not seen:
        raise WrongAnswer("The network was not called.")
    x_t, t = seen[0]
    if t.shape != (256,) or t.is_floating_point():
        raise WrongAnswer(f"The network needs one integer t per image; it got {tuple(t.shape)} of {t.dtype}.")
    if len(t.unique()) == 1:
        raise WrongAnswer("All images have the same t: draw one for each image.")
    if torch.equal(x_t, x_0):
        raise WrongAnswer("The network sees the clean images: add the noise first.")
    bright = 1e6  # so that the noise does not matter, and x_t shows at which t it was made
    answer(predicts_zero, torch.full((256, 1, 1, 1), bright))
    made = (DIFFUSION.alpha_bar.sqrt() - seen[-1][0].view(-1, 1) / bright).abs().argmin(1)
    if (made != seen[-1][1]).sum() > 100:
        found = f"x_t was made at t = {made[0]}, and the network was given t = {seen[-1][1][0]}"
        raise WrongAnswer(f"{found}. Both take the same t.")
    if t.min() < 0 or t.max() > 999 or (t > 900).sum() == 0 or (t < 100).sum() == 0:
        raise WrongAnswer(f"t runs from {t.min()} to {t.max()}; draw it from 0 to 999.")
    noise = (x_t - DIFFUSION.extract(DIFFUSION.alpha_bar.sqrt(), t, x_0) * x_0).detach()
    if noise.std((1, 2, 3)).max() < 1e-4:
        raise WrongAnswer("All pixels of an image get the same noise: use torch.randn_like(x_0).")
    unit = noise / DIFFUSION.extract((1 - DIFFUSION.alpha_bar).sqrt(), t, x_0)
    if unit.std(0).mean() < 0.1:
        raise WrongAnswer("All images get the same noise: use torch.randn_like(x_0).")
    if abs(loss.item() - (2 / torch.pi) ** 0.5) < 0.02:
        raise WrongAnswer("That is the mean absolute error of the noise; take the mean squared error.")
    for sums, size in (("pixels", 64), ("images", 256), ("images and pixels", 64 * 256)):
        if abs(loss.item() / size - 1) < 0.05:
            raise WrongAnswer(f"The loss is {loss.item():.1f}, a sum over {sums}. Take the mean.")
    if abs(loss.item() - 1) > 0.05:
        raise WrongAnswer(
            f"For a network that predicts zero the loss must be near 1, and is {loss.item():.3f}. "
            "Is the target the noise, and is the noise from randn?"
        )
    if not loss.requires_grad:
        raise WrongAnswer("The loss has no gradient. Call the network without no_grad, detach or item.")
    if answer(knows_the_noise, x_0).item() > 1e-2:
        raise WrongAnswer("Predicting the noise exactly still has a loss. Compare with the noise in x_t.")
    answer(predicts_zero, torch.zeros(20_000, 1, 1, 1))
    lowest, highest = seen[-1][1].min(), seen[-1][1].max()
    if (lowest, highest) != (0, 999):
        end = "lower end of randint is inclusive" if lowest > 0 else "upper end of randint is exclusive"
        raise WrongAnswer(f"In 20,000 draws t runs from {lowest} to {highest}, not from 0 to 999. The {end}.")


@numbered("1.5")
def update_average(answer: Callable) -> None:
    """Networks with one weight, whose running mean is known."""

    def moved(step: int, start: float, *weights: float) -> float:
        """Return the average, at first `start`, after these weights; `step` is that of the first."""
        network, average = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
        average.weight.data.fill_(start)
        for i, weight in enumerate(weights):
            network.weight.data.fill_(weight)
            with explaining("leaf Variable", "Gradients are on. Keep @torch.no_grad() above the function."):
                answer(average, network, step + i)
            if network.weight.item() != weight:
                raise WrongAnswer("The weights of `network` have changed. Only those of `average` may move.")
        return average.weight.item()

    late, first, mean = moved(1000, 10.0, 0.0), moved(1, 10.0, 2.0), moved(1, 10.0, 2.0, 4.0, 9.0)
    if late == first == 10:
        raise WrongAnswer("The average has not changed. Change its weights in place, for instance by lerp_.")
    if late == 0:
        raise WrongAnswer("That copies the latest weights and forgets all earlier ones.")
    if abs(late - 0.5) < 1e-3:
        raise WrongAnswer("Old and new weights are exchanged: the rate belongs to the new ones.")
    if abs(late - 10 * (1 - 1 / 1000)) < 1e-3:
        raise WrongAnswer("At step 1000 the new weights count 1/1000. The rate must not fall below 0.05.")
    if abs(late - 9.5) > 1e-3:
        raise WrongAnswer(f"At step 1000 the new weights count {1 - late / 10:.4f}, not 0.05.")
    if abs(first - 2) > 1e-3:
        raise WrongAnswer(
            f"After one step, {abs(first - 2) / 8:.0%} of the average are random initial weights. It must "
            "equal the weights after this step: which rate does that take?"
        )
    if abs(mean - 5) > 1e-3:
        raise WrongAnswer(f"After the weights 2, 4 and 9 the average is {mean:.2f}, and their mean is 5.")
