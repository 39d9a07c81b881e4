"""What checks the reader's functions of exercises 5.1 to 5.4 and 5.12, against independent values.

The checks of the solvers in fast_sampling.ipynb are in `studies/solver_checks.py`.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_05_cfg import solutions
from lesson_05_cfg.studies.solver_checks import (
    dpm_solver,
    dpm_solver_final,
    even_in_lambda,
    exponential_step,
    x_0_in_the_middle,
)

__all__ = [
    "dpm_solver",
    "dpm_solver_final",
    "drop_captions",
    "dynamic_threshold",
    "even_in_lambda",
    "exponential_step",
    "guide",
    "interval_denoiser",
    "x_0_in_the_middle",
]


@numbered("5.1")
def guide(answer: Callable) -> None:
    """Both ends, what lies beyond, and the variance channels."""
    torch.manual_seed(0)
    cond, uncond = torch.randn(2, 2, 6, 4, 4)
    fit = "The shapes do not fit. Slice the channels, [:, :channels], not the batch."
    with explaining("Sizes of tensors must match", fit):
        at_0, at_1, at_3 = (answer(cond.clone(), uncond.clone(), scale, 3) for scale in (0.0, 1.0, 3.0))
    given = cond.clone(), uncond.clone()
    answer(*given, 3.0, 3)
    if not (torch.equal(given[0], cond) and torch.equal(given[1], uncond)):
        raise WrongAnswer("The function changes cond or uncond. Return a new tensor.")
    if isinstance(at_3, Tensor) and tuple(at_3.shape) == (2, 3, 4, 4):
        raise WrongAnswer("Only eps_hat comes back. Append the other channels of cond: torch.cat(..., 1).")
    expect_shape(at_3, (2, 6, 4, 4))
    if allclose(at_3[:, :3], cond[:, :3] + 3 * (uncond - cond)[:, :3]):
        raise WrongAnswer("The two predictions are exchanged: start from uncond and move towards cond.")
    if allclose(at_0[:, :3], cond[:, :3]) and not allclose(at_3[:, :3], cond[:, :3]):
        raise WrongAnswer("At s = 0 the caption still counts. That is the paper's w, which is s - 1.")
    if allclose(at_0[:, :3], cond[:, :3]):
        raise WrongAnswer("The scale has no effect.")
    if allclose(at_3[:, :3], (uncond - 3 * (cond - uncond))[:, :3]):
        raise WrongAnswer("The sign is wrong: both scores were multiplied by the same factor, so it cancels.")
    if not (allclose(at_0[:, :3], uncond[:, :3]) and allclose(at_1[:, :3], cond[:, :3])):
        raise WrongAnswer("s = 0 must be the prediction without caption, and s = 1 the one with it.")
    if not allclose(at_3[:, :3] - at_1[:, :3], 2 * (at_1[:, :3] - at_0[:, :3])):
        raise WrongAnswer("From s = 1 to 3 the prediction must move twice as far as from 0 to 1.")
    if allclose(at_3[:, 3:], (uncond + 3 * (cond - uncond))[:, 3:]):
        raise WrongAnswer("The variance is guided, too. It is no score: take it from cond.")
    if not allclose(at_3[:, 3:], cond[:, 3:]):
        raise WrongAnswer("The channels of the variance must be those of cond.")
    expect_shape(answer(cond[:, :3], uncond[:, :3], 3.0, 3), (2, 3, 4, 4))
    one = answer(cond[:, :2], uncond[:, :2], 3.0, 1)
    if not allclose(one[:, 1:], cond[:, 1:2]):
        raise WrongAnswer("With channels = 1 the second channel is the variance. Use `channels`, not 3.")


@numbered("5.2")
def drop_captions(answer: Callable) -> None:
    """The rate, and that every caption is drawn on its own."""
    torch.manual_seed(0)
    mask = torch.arange(5) < torch.randint(1, 6, (4000, 1))
    before = mask.clone()
    fit = "The shapes do not fit: one random number per caption is [N], the mask is [N, L]. Add an axis."
    with explaining("must match", fit), explaining("bitwise", "The mask is bool: combine it with a bool."):
        kept = answer(mask, 0.2)
    expect_shape(kept.float(), (4000, 5))
    if kept.dtype != torch.bool:
        raise WrongAnswer(f"The mask must stay bool; it is {kept.dtype}.")
    dropped = ~kept.any(1)
    if (kept & ~before).any():
        raise WrongAnswer("Padding became a token: the result may only be True where the mask is.")
    if (kept != before)[~dropped].any():
        raise WrongAnswer("Some captions lose only some of their tokens. Drop a caption as a whole.")
    if dropped.all() or not dropped.any():
        raise WrongAnswer("The whole batch shares one random number. Draw one for each caption.")
    if torch.equal(dropped, ~answer(mask, 0.2).any(1)):
        raise WrongAnswer("Two calls drop the same captions. Draw new random numbers in each call.")
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
    fit = "The shapes do not fit: one percentile per image is [N], the images are [N, C, H, W]. Add axes."
    fraction = "tensor.quantile takes a fraction between 0 and 1: divide the percentile by 100."
    with explaining("must match", fit), explaining("range [0, 1]", fraction):
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
    a = np.percentile(np.abs(x_0[2].numpy()), 90)
    a_signed = np.percentile(x_0[2].numpy(), 90)
    a_channel = x_0[2].abs().flatten(1).quantile(0.9, dim=1).clamp(min=1)[:, None, None]
    hints = {
        "The percentile is that of |x_0|: take the absolute value first.": x_0[2].clamp(-a_signed, a_signed)
        / a_signed,
        "Each channel has its own percentile. Take one per image: flatten(1).": (x_0[2] / a_channel).clamp(
            -1, 1
        ),
        "The image is clipped at 1 and then divided. Clip it at the percentile.": x_0[2].clamp(-1, 1) / a,
    }
    for hint, wrong in hints.items():
        if allclose(result[2], wrong):
            raise WrongAnswer(hint)
    if not allclose(result[2], torch.from_numpy(np.clip(x_0[2].numpy(), -a, a) / a)):
        raise WrongAnswer("The third image is not clipped at the 90th percentile of |x_0| and divided by it.")


@numbered("5.12")
def interval_denoiser(answer: Callable) -> None:
    """Inside, outside and at both ends, and how often the network is evaluated."""
    torch.manual_seed(0)
    cond, uncond, x_t = torch.tensor(2.0), torch.tensor(-0.5), torch.randn(2, 3, 4, 4)
    calls: list[int] = []

    def network(x_t: Tensor, t: Tensor, condition: Tensor) -> Tensor:
        calls.append(len(x_t))
        return torch.cat([(x_t + t.view(-1, 1, 1, 1) / 1000) * condition, x_t + condition], 1)

    denoiser = answer(network, cond, uncond, 3.0, 300, 600)
    if not callable(denoiser):
        raise WrongAnswer("It does not return a function. Return a denoiser (x_t, t) -> output.")
    one_batch = "cond and uncond need not be tensors that can be concatenated: call the network twice."
    ambiguous = "t is a tensor with one timestep per sample, and all are equal: compare t[0]."
    for i in (450, 100, 900, 300, 600, 299, 601):
        t, inside = torch.full((2,), i), 300 <= i <= 600
        plain, without = network(x_t, t, cond), network(x_t, t, uncond)
        guided = solutions.guide(plain, without, 3.0, 3)
        calls.clear()
        with (
            explaining("ambiguous", ambiguous),
            explaining("2 elements", ambiguous),
            explaining("concatenated", one_batch),
        ):
            result = denoiser(x_t, t)
        expect_shape(result, (2, 6, 4, 4))
        wanted, other = (guided, plain) if inside else (plain, guided)
        if not allclose(result, wanted):
            if allclose(result, other) and i in (300, 600):
                raise WrongAnswer("t = low and t = high belong to the interval: use <=.")
            if allclose(result, other) and i == 450:
                raise WrongAnswer("In the interval (t = 450 of 300 to 600) the result is not guided.")
            if allclose(result, other):
                raise WrongAnswer(f"The result is guided at t = {i}, outside of the interval 300 to 600.")
            if inside and allclose(result, solutions.guide(without, plain, 3.0, 3)):
                raise WrongAnswer("The two predictions are exchanged: guide(cond, uncond, ...).")
            if inside and allclose(result, without + 3 * (plain - without)):
                raise WrongAnswer("The variance is guided, too. Call your function `guide`.")
            if not inside and allclose(result, without):
                raise WrongAnswer("Outside of the interval the network must get cond, which is s = 1.")
            raise WrongAnswer(f"At t = {i} the result is neither the guided prediction nor that with cond.")
        if sum(calls) > (4 if inside else 2):
            raise WrongAnswer(
                "Outside of the interval the network must be evaluated once, or it saves no time."
            )
