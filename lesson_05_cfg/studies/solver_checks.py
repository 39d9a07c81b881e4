"""What checks the reader's functions of fast_sampling.ipynb, against independent values."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.exercises import WrongAnswer, expect_shape, numbered

GRID, GIVEN = (-1.0, -0.8, 0.0, 0.2, 1.2), (0.5, 0.1, 0.3, -0.2)  # lambda; a predicted x_0 for each step


def alpha_sigma(lambda_: float) -> tuple[float, float]:
    """Return alpha and sigma at lambda = log(alpha / sigma), with alpha^2 + sigma^2 = 1."""
    return 1 / np.sqrt(1 + np.exp(-2 * lambda_)), 1 / np.sqrt(1 + np.exp(2 * lambda_))


def exact(x: float, x_0: float, start: float, end: float) -> float:
    """Return the exact solution at `end` for a constant predicted x_0."""
    return alpha_sigma(end)[1] * (x / alpha_sigma(start)[1] + (np.exp(end) - np.exp(start)) * x_0)


@numbered("5.7")
def exponential_step(answer: Callable) -> None:
    """Compare with the solution for a constant x_0, and with its likely mistakes."""
    start, end, x, x_0 = -0.5, 0.3, 0.7, 0.4
    result = answer(*[torch.tensor([v], dtype=torch.float64) for v in (x, x_0, start, end)])
    expect_shape(result, (1,))
    (alpha_1, sigma_1), (alpha_2, sigma_2) = alpha_sigma(start), alpha_sigma(end)
    wanted, linear = exact(x, x_0, start, end), sigma_2 / sigma_1 * x
    integral = (np.exp(end) - np.exp(start)) * x_0
    same = {
        "The first term lacks its factor sigma_end / sigma_start.": x + sigma_2 * integral,
        "The integral lacks its factor sigma_end.": linear + integral,
        "The factor of x is upside down: it is sigma_end / sigma_start.": sigma_1 / sigma_2 * x
        + sigma_2 * integral,
        "The integral of e^lambda from start to end is e^end - e^start.": linear - sigma_2 * integral,
        "sigma and alpha are exchanged: sigma^2 is sigmoid(-2 lambda).": alpha_2 / alpha_1 * x
        + alpha_2 * integral,
        "The factor e^lambda is missing in the integral.": linear + sigma_2 * (end - start) * x_0,
        "sigma is the square root of sigmoid(-2 lambda).": (sigma_2 / sigma_1) ** 2 * x
        + sigma_2**2 * integral,
        "e^end - e^start is not e^(end - start).": linear + sigma_2 * np.exp(end - start) * x_0,
        "e^lambda is not constant during the step: integrate it.": linear
        + sigma_2 * (end - start) * np.exp(start) * x_0,
        "e^lambda in the middle is an approximation: integrate it.": linear
        + sigma_2 * (end - start) * np.exp((start + end) / 2) * x_0,
        "sigma^2 is sigmoid(-2 lambda): the 2 is missing.": alpha_sigma(end / 2)[1]
        * (x / alpha_sigma(start / 2)[1] + integral),
        "The integral is multiplied by sigma at the end of the step.": linear + sigma_1 * integral,
        "The paper's h is end - start: the factor is alpha_end (1 - e^(start - end)).": linear
        + alpha_2 * (1 - np.exp(end - start)) * x_0,
    }
    for hint, value in same.items():
        if abs(result.item() - value) < 1e-6:
            raise WrongAnswer(hint)
    if abs(result.item() - wanted) > 1e-6:
        raise WrongAnswer(
            f"From lambda = {start} to {end}, x = {x} and x_0 = {x_0} must become {wanted:.4f}; "
            f"yours becomes {result.item():.4f}."
        )


@numbered("5.8")
def x_0_in_the_middle(answer: Callable) -> None:
    """A line through two points is known everywhere."""
    at = [torch.tensor([2.0 + 3.0 * x]) for x in (-0.4, 0.0)]  # x_0 = 2 + 3 lambda; steps of 0.4 and 0.7
    h, h_before = torch.tensor(0.7), torch.tensor(0.4)
    result = answer(at[1], at[0], h, h_before)
    expect_shape(result, (1,))
    value = result.item()
    same = {
        "That is x_0 at the start of the step. The earlier prediction must count, too.": 2.0,
        "That is x_0 at the end of the step. In the middle, only half of h has passed.": 2 + 3 * 0.7,
        "The sign is wrong: the line continues from x_0_before through x_0.": 2 - 3 * 0.35,
        "Both steps count as equally long. The slope is the difference divided by h_before.": 2 + 1.2 * 0.5,
        "h and h_before are exchanged: the slope is the difference divided by h_before.": 2 + 1.2 * 0.4 / 1.4,
        "h / 2 * h_before multiplies by h_before. Put 2 * h_before in parentheses.": 2 + 1.2 * 0.35 * 0.4,
        "The line is followed from x_0_before. The step starts at x_0.": 0.8 + 3 * 0.35,
        "The way from x_0 to the middle of the step is h / 2, without h_before.": 2 + 3 * (0.7 + 0.4) / 2,
        "h is missing: the value at h / 2 is x_0 plus the slope times h / 2.": 2 + 3 / 2,
        "That is the mean of both predictions. Continue the line beyond x_0.": (2 + 0.8) / 2,
    }
    for hint, known in same.items():
        if abs(value - known) < 1e-4:
            raise WrongAnswer(hint)
    if abs(value - 3.05) > 1e-4:
        raise WrongAnswer(
            "On the line through 0.8 (at lambda = -0.4) and 2 (at 0) the value at 0.35 is 3.05; "
            f"you get {value:.2f}."
        )


def by_hand(weights: tuple[float, ...], base: int | None = None, part: float = 1.0) -> float:
    """Return x after the steps of GRID; step i + 1 adds weights[i] times the change of the prediction.

    base: the index of the earlier prediction, the last one by default. part: how much of each step is taken.
    """
    x = 0.7
    for i, weight in enumerate((0.0, *weights)):
        x_0_middle = GIVEN[i] + weight * (GIVEN[i] - GIVEN[i - 1 if base is None else base])
        x = exact(x, x_0_middle, GRID[i], GRID[i] + part * (GRID[i + 1] - GRID[i]))
    return x


def fed_back(weights: tuple[float, ...]) -> float:
    """Return x after the steps of GRID if each extrapolation serves as the next earlier prediction."""
    x, before = 0.7, GIVEN[0]
    for i, weight in enumerate((0.0, *weights)):
        before = GIVEN[i] + weight * (GIVEN[i] - before)
        x = exact(x, before, GRID[i], GRID[i + 1])
    return x


RIGHT = (2.0, 0.125, 2.5)  # h / (2 h_before), for steps of length 0.2, 0.8, 0.2 and 1
TYPICAL = {
    "No step extrapolates. Does each step use the prediction of the step before it?": by_hand(
        (0.0, 0.0, 0.0)
    ),
    "h and h_before are exchanged: diff()[i] is the current step, diff()[i - 1] the one before.": by_hand(
        (0.125, 2.0, 0.1)
    ),
    "All steps count as equally long. Step i has the length lambdas.diff()[i].": by_hand((0.5, 0.5, 0.5)),
    "x_0_before must be replaced in every step.": by_hand(RIGHT, base=0),
    "x_0_before must be the prediction itself, not its extrapolation.": fed_back(RIGHT),
    "Each step ends in its middle. Only x_0 is taken there; x goes to lambdas[i + 1].": by_hand(
        RIGHT, part=0.5
    ),
}


def run_on_grid(answer: Callable) -> float:
    """Return x at the end of GRID, where step i predicts GIVEN[i]; refuse a wrong sequence of evaluations."""
    calls: list[int] = []

    def predict_x_0(x: Tensor, i: int) -> Tensor:
        if not 0 <= i < len(GIVEN):
            raise WrongAnswer(f"The network is asked at i = {i}, but 4 steps start at i = 0, 1, 2 and 3.")
        calls.append(i)
        return torch.full_like(x, GIVEN[i])

    start = torch.tensor([0.7], dtype=torch.float64)
    result = answer(predict_x_0, start, torch.tensor(GRID, dtype=torch.float64))
    expect_shape(result, (1,))
    if len(calls) > len(GIVEN):
        raise WrongAnswer(f"4 steps evaluated the network {len(calls)} times. Keep the last prediction.")
    if calls != list(range(len(GIVEN))):
        raise WrongAnswer("The network must be evaluated once per step, at i = 0, 1, 2 and so on.")
    return result.item()


@numbered("5.9")
def dpm_solver(answer: Callable) -> None:
    """Unequal steps by hand, and Gaussian data: half the steps, four times the error."""
    result = run_on_grid(answer)
    final = "The last step does not extrapolate. That is exercise 5.10; here all but the first do."
    for hint, value in {final: by_hand((2.0, 0.125, 0.0)), **TYPICAL}.items():
        if abs(result - value) < 1e-6:
            raise WrongAnswer(hint)
    errors = [gaussian_error(answer, steps) for steps in (40, 80)]
    if errors[0] > 0.05:
        raise WrongAnswer(f"For Gaussian data the result is off by {errors[0]:.3f} after 40 steps.")
    ratio = errors[0] / max(errors[1], 1e-15)
    if ratio < 2**1.5:
        raise WrongAnswer(f"Twice the steps divide the error by {ratio:.1f}, and should by 4.")
    if abs(result - by_hand(RIGHT)) > 1e-6:
        raise WrongAnswer("With steps of unequal length the result is wrong, with equal ones it is right.")


def gaussian_error(answer: Callable, steps: int) -> float:
    """Return the error on Gaussian data, whose exact solution is known."""
    mean, variance = 0.5, 0.09
    lambdas = torch.linspace(-3, 3, steps + 1, dtype=torch.float64)
    alpha, sigma = (2 * lambdas).sigmoid().sqrt(), (-2 * lambdas).sigmoid().sqrt()
    std = (alpha.square() * variance + sigma.square()).sqrt()

    def predict_x_0(x: Tensor, i: int) -> Tensor:
        return mean + alpha[i] * variance / std[i] ** 2 * (x - alpha[i] * mean)

    x = alpha[0] * mean + std[0] * torch.tensor([1.5], dtype=torch.float64)
    result = answer(predict_x_0, x, lambdas)
    return abs((result - alpha[-1] * mean - std[-1] * 1.5).item())


@numbered("5.10")
def dpm_solver_final(answer: Callable) -> None:
    """Four steps by hand, whose last one is long."""
    result = run_on_grid(answer)
    hints = {
        "The last step still extrapolates. Its index is len(lambdas) - 2.": by_hand(RIGHT),
        "The last two steps are of first order. Only the last one must be.": by_hand((2.0, 0.0, 0.0)),
        "Only the last step extrapolates. It must be the other way round.": by_hand((0.0, 0.0, 2.5)),
        "The second step, four times as long as the first, does not extrapolate. A rule on the length works, "
        "too, but here change only the last step, as the authors do.": by_hand((0.0, 0.125, 0.0)),
        "h / h_before is limited to 1. That works, too, but here change only the last step, as the authors "
        "do.": by_hand((0.5, 0.125, 0.5)),
        **TYPICAL,
    }
    for hint, value in hints.items():
        if abs(result - value) < 1e-6:
            raise WrongAnswer(hint)
    if abs(result - by_hand((2.0, 0.125, 0.0))) > 1e-6:
        raise WrongAnswer("Four steps do not end where they should: change nothing but the last one.")


@numbered("5.11")
def even_in_lambda(answer: Callable) -> None:
    """Compare with the nearest timesteps in a table whose lambda falls faster and faster."""
    lambdas = 5 - torch.arange(101, dtype=torch.float64).square() / 1000  # from 5 at t = 0 to -5 at t = 100
    kept = [int(t) for t in answer(lambdas, 6)]
    if kept != sorted(kept):
        raise WrongAnswer("`respace` takes an increasing list: sort the timesteps.")
    if kept == [0, 20, 40, 60, 80, 100]:
        raise WrongAnswer("These timesteps are even in t. Space the values of lambda evenly instead.")
    if kept[:1] != [0] or kept[-1:] != [100]:
        raise WrongAnswer(
            f"The list goes from {kept[0]} to {kept[-1]}, and should from 0 to the last timestep."
        )
    if len(kept) != 6:
        raise WrongAnswer(f"Six timesteps are wanted, these are {len(kept)}.")
    wanted = [0, 45, 63, 77, 89, 100]  # lambda = 5, 3, 1, -1, -3, -5
    if kept != wanted:
        raise WrongAnswer(f"For lambda = 5 - t^2 / 1000 the timesteps are {wanted}; yours are {kept}.")
    many = [int(t) for t in answer(lambdas, 90)]
    if len(many) != len(set(many)):
        raise WrongAnswer("With 90 values some timesteps occur twice. Keep each once.")
