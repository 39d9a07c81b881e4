"""What checks exercise 4.9, an empty file: functions whose weights and widths only the reader knows."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape

ALPHA_BAR = torch.cos(torch.linspace(0.01, 0.99, 1000) * torch.pi / 2) ** 2


def caption() -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, the same with another second token, and the mask, each [2, 8]."""
    torch.manual_seed(0)
    tokens, mask = torch.randint(1, 29, (2, 8)), torch.arange(8) < torch.tensor([[3], [5]])
    other = tokens.clone()
    other[:, 1] += 1
    return tokens, other, mask


def encoder(answer: Callable) -> None:
    """Change what must matter and what must not."""
    tokens, other, mask = caption()
    pooled, states = answer(tokens, mask)
    expect_shape(states, (2, 8, states.shape[-1]))
    expect_shape(pooled, (2, pooled.shape[-1]))
    hidden = answer(tokens * mask, mask)
    if not allclose(pooled, hidden[0]) or not allclose(states, hidden[1]):
        raise WrongAnswer("Token ids at padded positions change the result. Use the mask.")
    changed = answer(other, mask)
    if (changed[1] - states).abs().amax(-1).min() < 1e-6:
        raise WrongAnswer("After a word has changed, some token states are the same: all must attend to it.")
    if (changed[0] - pooled).abs().amax(-1).min() < 1e-6:
        raise WrongAnswer("After a word has changed, the pooled embedding is the same.")
    if allclose(answer(tokens[:, [1, 0, *range(2, 8)]], mask)[0], pooled):
        raise WrongAnswer("The order of the words is lost: add an embedding of the position.")


def read_text(answer: Callable, encoder: Callable) -> None:
    """Change a word, an image position, and the order of the token states."""
    tokens, other, mask = caption()
    states, changed = encoder(tokens, mask)[1], encoder(other, mask)[1]
    x = torch.randn(2, 16, states.shape[-1])
    result = answer(x, states)
    expect_shape(result, tuple(x.shape))
    if (answer(x, changed) - result).abs().amax(-1).min() < 1e-6:
        raise WrongAnswer("After a word has changed, some image positions are the same: all attend to text.")
    moved = x.clone()
    moved[:, 5] = -moved[:, 5]
    if (answer(moved, states) - result).abs().amax(-1)[:, torch.arange(16) != 5].min() < 1e-6:
        raise WrongAnswer("Image positions do not attend to each other.")
    if not allclose(answer(x, states.flip(1)), result):
        raise WrongAnswer("The order of the token states matters. Are keys and values in the same order?")


def knows_x_0(x_0: Tensor, factor: Tensor, x_t: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Return the velocity for known images, times a factor per image."""
    a = ALPHA_BAR[t].view(-1, 1, 1, 1)
    return factor.view(-1, 1, 1, 1) * (a.sqrt() * x_t - x_0) / (1 - a).sqrt()


def loss(answer: Callable) -> None:
    """Try networks that know the velocity of all images, of none, and of the first one."""
    torch.manual_seed(0)
    x_0, text, ones = torch.randn(64, 3, 8, 8), torch.zeros(64, 1), torch.ones(64)
    known, zero = (answer(partial(knows_x_0, x_0, factor), x_0, text) for factor in (ones, 0 * ones))
    expect_shape(known, ())
    if known > 1e-3:
        raise WrongAnswer(f"A network that knows the velocity has the loss {known:.2f} and not 0.")
    if not 0.9 < zero < 1.1:  # images and noise of variance 1 have a velocity of variance 1
        raise WrongAnswer(f"A network that returns 0 has the loss {zero:.2f}; the variance of v is 1.")
    if answer(partial(knows_x_0, x_0, (torch.arange(64) == 0).float()), x_0, text) < 0.8:
        raise WrongAnswer("A network that knows only the first image has too low a loss. Average over all.")
