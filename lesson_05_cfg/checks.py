"""What checks the reader's functions of cfg.ipynb and fast_sampling.ipynb, against independent values."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, numbered


@numbered("5.1")
def guide(answer: Callable) -> None:
    """Both ends, what lies beyond, and the variance channels."""
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 2, 6, 4, 4)
    at_0, at_1, at_3 = (answer(cond, uncond, scale, 3) for scale in (0.0, 1.0, 3.0))
    expect_shape(at_3, (2, 6, 4, 4))
    if allclose(at_3[:, :3], cond[:, :3] + 3 * (uncond - cond)[:, :3]):
        raise WrongAnswer("The two predictions are exchanged: start from uncond and move towards cond.")
    if allclose(at_0[:, :3], cond[:, :3]) and not allclose(at_3[:, :3], cond[:, :3]):
        raise WrongAnswer("At s = 0 the caption still counts. That is the paper's w, which is s - 1.")
    if allclose(at_0[:, :3], cond[:, :3]):
        raise WrongAnswer("The scale has no effect.")
    if not (allclose(at_0[:, :3], uncond[:, :3]) and allclose(at_1[:, :3], cond[:, :3])):
        raise WrongAnswer("s = 0 must be the prediction without caption, and s = 1 the one with it.")
    if not allclose(at_3[:, :3] - at_1[:, :3], 2 * (at_1[:, :3] - at_0[:, :3])):
        raise WrongAnswer("From s = 1 to 3 the prediction must move twice as far as from 0 to 1.")
    if allclose(at_3[:, 3:], (uncond + 3 * (cond - uncond))[:, 3:]):
        raise WrongAnswer("The variance is guided, too. It is no score: take it from cond.")
    if not allclose(at_3[:, 3:], cond[:, 3:]):
        raise WrongAnswer("The channels of the variance must be those of cond.")
    expect_shape(answer(cond[:, :3], uncond[:, :3], 3.0, 3), (2, 3, 4, 4))


@numbered("5.2")
def drop_captions(answer: Callable) -> None:
    """The rate, and that every caption is drawn on its own."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.randint(1, 6, (4000, 1))
    before = mask.clone()
    kept = answer(mask, 0.2)
    expect_shape(kept.float(), (4000, 5))
    dropped = ~kept.any(1)
    if (kept & ~before).any():
        raise WrongAnswer("Padding became a token: the result may only be True where the mask is.")
    if (kept != before)[~dropped].any():
        raise WrongAnswer("Some captions lose only some of their tokens. Drop a caption as a whole.")
    if dropped.all() or not dropped.any():
        raise WrongAnswer("The whole batch shares one random number. Draw one for each caption.")
    rate = dropped.float().mean().item()
    if abs(rate - 0.8) < 0.05:
        raise WrongAnswer("80 % are dropped: the condition is the wrong way round.")
    if abs(rate - 0.2) > 0.05:
        raise WrongAnswer(f"{rate:.0%} of the captions are dropped, not 20 %.")
    if not torch.equal(mask, before):
        raise WrongAnswer("The mask that was passed in has changed. Return a new one.")


@numbered("5.4")
def dynamic_threshold(answer: Callable) -> None:
    """Compare with numpy, image by image."""
    torch.manual_seed(0)
    x_0 = torch.randn(3, 3, 16, 16) * torch.tensor([0.1, 1.0, 4.0]).view(3, 1, 1, 1)
    result = answer(x_0.clone(), 90)
    expect_shape(result, (3, 3, 16, 16))
    if allclose(result, x_0.clamp(-1, 1)):
        raise WrongAnswer("That is plain clipping. Clip at the percentile, then divide by it.")
    if result.abs().max() > 1.0001:
        raise WrongAnswer(f"Values up to {result.abs().max():.2f} remain. Afterwards all must be in [-1, 1].")
    if not allclose(answer(x_0[1:2].clone(), 90)[0], result[1]):
        raise WrongAnswer("The result for an image depends on the rest of the batch. Use its own percentile.")
    if not allclose(result[0], x_0[0]):
        raise WrongAnswer("An image that is in range has changed. The threshold must be at least 1.")
    s = np.percentile(np.abs(x_0[2].numpy()), 90)
    if not allclose(result[2], torch.from_numpy(np.clip(x_0[2].numpy(), -s, s) / s)):
        raise WrongAnswer("The third image is not clipped at the 90th percentile of |x_0| and divided by it.")


def alpha_sigma(lambda_: float) -> tuple[float, float]:
    """Return alpha and sigma at lambda = log(alpha / sigma), with alpha^2 + sigma^2 = 1."""
    return 1 / np.sqrt(1 + np.exp(-2 * lambda_)), 1 / np.sqrt(1 + np.exp(2 * lambda_))


def exact(x: float, a: float, b: float, start: float, end: float) -> float:
    """Return the exact solution at `end` for a predicted x_0 of a + b (lambda - start)."""
    a -= b * start
    integral = np.exp(end) * (a + b * (end - 1)) - np.exp(start) * (a + b * (start - 1))
    return alpha_sigma(end)[1] * (x / alpha_sigma(start)[1] + integral)


@numbered("5.8")
def exponential_step(answer: Callable) -> None:
    """Compare with the solution for a constant x_0, and with the direct way from image and noise."""
    start, end, x, x_0 = -0.5, 0.3, 0.7, 0.4
    numbers = [torch.tensor([v], dtype=torch.float64) for v in (x, x_0, start, end)]
    result = answer(*numbers)
    expect_shape(result, (1,))
    (alpha_1, sigma_1), (alpha_2, sigma_2) = alpha_sigma(start), alpha_sigma(end)
    wanted = exact(x, x_0, 0.0, start, end)
    same = {
        "The first term lacks its factor sigma_end / sigma_start.": x
        + sigma_2 * (np.exp(end) - np.exp(start)) * x_0,
        "The integral lacks its factor sigma_end.": sigma_2 / sigma_1 * x
        + (np.exp(end) - np.exp(start)) * x_0,
        "The factor of x is upside down: it is sigma_end / sigma_start.": sigma_1 / sigma_2 * x
        + sigma_2 * (np.exp(end) - np.exp(start)) * x_0,
        "The integral of e^lambda from start to end is e^end - e^start.": sigma_2 / sigma_1 * x
        + sigma_2 * (np.exp(start) - np.exp(end)) * x_0,
        "sigma and alpha are exchanged: sigma^2 is sigmoid(-2 lambda).": alpha_2 / alpha_1 * x
        + alpha_2 * (np.exp(end) - np.exp(start)) * x_0,
    }
    same["The factor e^lambda is missing in the integral."] = (
        sigma_2 / sigma_1 * x + sigma_2 * (end - start) * x_0
    )
    for hint, value in same.items():
        if abs(result.item() - value) < 1e-6:
            raise WrongAnswer(hint)
    if abs(result.item() - wanted) > 1e-6:
        raise WrongAnswer(
            f"From lambda = {start} to {end}, x = {x} and x_0 = {x_0} must become {wanted:.4f}; "
            f"yours becomes {result.item():.4f}."
        )


@numbered("5.9")
def x_0_in_the_middle(answer: Callable) -> None:
    """A line through two points is known everywhere."""
    at = [torch.tensor([2.0 + 3.0 * x]) for x in (-0.4, 0.0)]  # x_0 = 2 + 3 lambda; steps of 0.4 and 0.6
    h, h_before = torch.tensor(0.6), torch.tensor(0.4)
    result = answer(at[1], at[0], h, h_before)
    expect_shape(result, (1,))
    value = result.item()
    if abs(value - 2.0) < 1e-5:
        raise WrongAnswer("That is x_0 at the start of the step. The earlier prediction must count, too.")
    if abs(value - (2 + 3 * 0.6)) < 1e-4:
        raise WrongAnswer("That is x_0 at the end of the step. In the middle, only half of h has passed.")
    if abs(value - (2 - 3 * 0.3)) < 1e-4:
        raise WrongAnswer("The sign is wrong: the line continues from x_0_before through x_0.")
    if abs(value - (2 + 1.2 * 0.5)) < 1e-4:
        raise WrongAnswer(
            "Both steps count as equally long. The slope is the difference divided by h_before."
        )
    if abs(value - 2.9) > 1e-4:
        raise WrongAnswer(
            "On the line through 0.8 (at lambda = -0.4) and 2 (at 0) the value at 0.3 is 2.9; "
            f"you get {value:.2f}."
        )


@numbered("5.10")
def dpm_solver(answer: Callable) -> None:
    """Gaussian data, whose exact solution is known: half the steps, four times the error."""
    mean, variance = 0.5, 0.09

    def error(steps: int) -> float:
        lambdas = torch.linspace(-3, 3, steps + 1, dtype=torch.float64)
        alpha, sigma = (2 * lambdas).sigmoid().sqrt(), (-2 * lambdas).sigmoid().sqrt()
        std = (alpha.square() * variance + sigma.square()).sqrt()
        calls.clear()

        def predict_x_0(x: Tensor, i: int) -> Tensor:
            calls.append(i)
            return mean + alpha[i] * variance / std[i] ** 2 * (x - alpha[i] * mean)

        x = alpha[0] * mean + std[0] * torch.tensor([1.5], dtype=torch.float64)
        result = answer(predict_x_0, x, lambdas)
        expect_shape(result, (1,))
        return abs((result - alpha[-1] * mean - std[-1] * 1.5).item())

    calls: list[int] = []
    coarse = error(40)
    if len(calls) > 40:
        raise WrongAnswer(f"40 steps evaluated the network {len(calls)} times. Keep the last prediction.")
    if calls != list(range(40)):
        raise WrongAnswer("The network must be evaluated once per step, at i = 0, 1, 2 and so on.")
    order = np.log2(coarse / max(error(80), 1e-15))
    if coarse > 0.05:
        raise WrongAnswer(f"For Gaussian data the result is off by {coarse:.3f} after 40 steps.")
    if order < 1.5:
        raise WrongAnswer(
            f"Twice the steps divide the error by {2**order:.1f}, and should by 4. Does each step use the "
            "prediction of the step before it, and the prediction itself, not its extrapolation?"
        )
    check_lengths(answer)


def check_lengths(answer: Callable) -> None:
    """Compare a run of three steps of unequal length with one by hand, which the order cannot replace."""
    grid, given = (-1.0, -0.8, 0.0, 0.2), (0.5, 0.1, 0.3)

    def by_hand(*weights: float) -> float:
        x = 0.7
        for i, weight in enumerate((0.0, *weights)):
            middle = given[i] + weight * (given[i] - given[i - 1])
            x = exact(x, middle, 0.0, grid[i], grid[i + 1])
        return x

    start = torch.tensor([0.7], dtype=torch.float64)
    lambdas = torch.tensor(grid, dtype=torch.float64)
    result = answer(lambda x, i: torch.full_like(x, given[i]), start, lambdas).item()
    if abs(result - by_hand(0.125, 2.0)) < 1e-6:
        raise WrongAnswer("h and h_before are exchanged: h[i] is the current step, h[i - 1] the one before.")
    if abs(result - by_hand(0.5, 0.5)) < 1e-6:
        raise WrongAnswer(
            "All steps count as equally long. Step i has the length h[i], the one before h[i - 1]."
        )
    if abs(result - by_hand(2.0, 0.125)) > 1e-6:
        raise WrongAnswer(
            "With steps of length 0.2, 0.8 and 0.2 the result is wrong, with equal ones it is right."
        )
