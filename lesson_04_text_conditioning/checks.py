"""What checks the reader's functions of text_conditioning.ipynb, against independent values."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, numbered


@numbered("4.1")
def merge(answer: Callable) -> None:
    """Words whose merges are known."""
    cases = [
        (list("seven"), ("s", "e"), ["se", "v", "e", "n"]),
        (list("seven zero"), ("e", "r"), [*"seven", " ", "z", "er", "o"]),
        (["se", "v", "e", "n"], ("e", "n"), ["se", "v", "en"]),
        (list("zero"), ("x", "y"), list("zero")),
        (list("sevens"), ("s", "e"), ["se", "v", "e", "n", "s"]),
        (list("banana"), ("a", "n"), ["b", "an", "an", "a"]),
        (["a", "a", "a"], ("a", "a"), ["aa", "a"]),
        (list("see"), ("e", "e"), ["s", "ee"]),
    ]
    for tokens, pair, wanted in cases:
        given = list(tokens)
        result = answer(given, pair)
        if given != tokens:
            raise WrongAnswer("The list that was passed in has changed. Build a new list.")
        if not isinstance(result, list):
            raise WrongAnswer(f"It returns {type(result).__name__}; return a list of strings.")
        if "".join(result) != "".join(tokens):
            raise WrongAnswer(f"{tokens} with {pair} became {result}. Merging must not change the text.")
        if result == tokens != wanted:
            raise WrongAnswer(f"{tokens} with {pair} stayed as it is; wanted is {wanted}.")
        if result != wanted:
            raise WrongAnswer(f"{tokens} with {pair} became {result}; wanted is {wanted}.")


@numbered("4.2")
def look_up(answer: Callable) -> None:
    """Compare with PyTorch's attention, and with scores whose exponential is too large for a float."""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 16), torch.randn(6, 16), torch.randn(6, 3)
    result = answer(q, k, v)
    expect_shape(result, (4, 3))
    if allclose(result, (q @ k.T).softmax(1) @ v):
        raise WrongAnswer(
            "The scores are not divided by sqrt(d). In many dimensions one key would win always."
        )
    if allclose(result, (q @ k.T / 16).softmax(1) @ v):
        raise WrongAnswer("The scores are divided by d; divide by sqrt(d).")
    if allclose(result, (q @ k.T / 4).softmax(0) @ v):
        raise WrongAnswer("The softmax runs over the queries. The weights of one query must add up to 1.")
    if allclose(result, (q @ k.T / 4) @ v):
        raise WrongAnswer("The softmax is missing: the weights of one query must add up to 1.")
    if not allclose(result, F.scaled_dot_product_attention(q, k, v)):
        raise WrongAnswer("The result differs from PyTorch's attention. Is it softmax(q k^T / sqrt(d)) v?")
    if not answer(1000 * q, k, v).isfinite().all():
        raise WrongAnswer(
            "Large scores give inf or NaN. `softmax` subtracts the largest score first; use it."
        )


@numbered("4.3")
def embed_caption(answer: Callable) -> None:
    """The token under the padding must not matter, and padding replaces the position too."""
    torch.manual_seed(0)
    tokens, positions, padding = torch.randn(2, 4, 3), torch.randn(4, 3), torch.randn(4, 3)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    try:
        result = answer(tokens, positions, padding, mask)
    except RuntimeError as error:
        raise WrongAnswer("The shapes do not fit: mask is [N, L], so it needs mask[..., None].") from error
    expect_shape(result, (2, 4, 3))
    if allclose(result[1], positions + padding):
        raise WrongAnswer("The padding embedding replaces token and position; here the position is added.")
    if allclose(result[1], tokens[1] + positions):
        raise WrongAnswer("The mask is inverted: it is True where there is a token.")
    if not allclose(result[1], padding):
        raise WrongAnswer("Where the mask is False, the result must be the padding embedding.")
    if allclose(result[0, :2], tokens[0, :2]):
        raise WrongAnswer("The positional embedding is missing: add it to the tokens.")
    if not allclose(result[0, :2], (tokens[0] + positions)[:2]):
        raise WrongAnswer("Where the mask is True, the result must be token + position.")
    if not allclose(result[0, 2:], padding[2:]):
        raise WrongAnswer("Each position has its own padding embedding.")


@numbered("4.4")
def add_text(answer: Callable) -> None:
    """The weights of the text in one softmax, key by key."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)  # [N, heads, positions, d]
    text_k, text_v = torch.randn(2, 2, 4, 5, 8).unbind(0)
    result = answer(k, v, text_k, text_v)
    if not isinstance(result, tuple) or len(result) != 2:
        raise WrongAnswer("Return two tensors: the keys and the values.")
    if allclose(result[0], k):
        raise WrongAnswer("The text is missing: no pixel attends to it.")
    if result[0].shape[2] != 14:
        raise WrongAnswer(
            f"There are 9 positions and 5 tokens, so 14 keys; yours have the shape {tuple(result[0].shape)}. "
            "Concatenate along dimension 2."
        )
    keys, values = result
    expect_shape(keys, (2, 4, 14, 8))
    expect_shape(values, (2, 4, 14, 8))
    scores = torch.einsum("nhqd,nhkd->nhqk", q, torch.cat([text_k, k], 2)) / math.sqrt(8)
    wanted = torch.einsum("nhqk,nhkd->nhqd", scores.softmax(-1), torch.cat([text_v, v], 2))
    if not allclose(F.scaled_dot_product_attention(q, keys, values), wanted):
        raise WrongAnswer("Keys and values are in different orders, so a key has the value of another one.")
    if not allclose(keys[:, :, :5], text_k):
        raise WrongAnswer(
            "Attention does not depend on the order, but the maps of section 8 expect the text first."
        )


def angles() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x_0, noise, alpha_bar [3, 1, 1, 1] and x_t."""
    torch.manual_seed(0)
    x_0, noise = torch.randn(2, 3, 1, 4, 4).double()
    alpha_bar = torch.tensor([0.99, 0.5, 0.04]).double().view(-1, 1, 1, 1)
    return x_0, noise, alpha_bar, alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise


@numbered("4.5")
def velocity(answer: Callable) -> None:
    """Compare with the slope of x_t along the angle, by finite differences."""
    x_0, noise, alpha_bar, x_t = angles()
    result = answer(x_0, noise, alpha_bar)
    expect_shape(result, (3, 1, 4, 4))
    angle, step = alpha_bar.sqrt().acos(), 1e-5
    slope = ((angle + step).cos() * x_0 + (angle + step).sin() * noise - x_t) / step
    if allclose(result, -slope):
        raise WrongAnswer("The sign is wrong: with more noise, x_t moves towards the noise.")
    if allclose(result, alpha_bar.sqrt() * x_0 - (1 - alpha_bar).sqrt() * noise):
        raise WrongAnswer("x_0 and noise have each other's factor.")
    if allclose(result, x_t):
        raise WrongAnswer("That is x_t itself. The derivative of the cosine is minus the sine.")
    if allclose(result, alpha_bar * noise - (1 - alpha_bar) * x_0):
        raise WrongAnswer("The factors are the roots of alpha_bar and of 1 - alpha_bar.")
    if not torch.allclose(result, slope, atol=1e-3):
        raise WrongAnswer(
            "The result is not the derivative of x_t by the angle (finite differences disagree)."
        )


@numbered("4.6")
def noise_from_velocity(answer: Callable) -> None:
    """The velocity of known images and noise must give back the noise."""
    x_0, noise, alpha_bar, x_t = angles()
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
    result = answer(x_t, v, alpha_bar)
    expect_shape(result, (3, 1, 4, 4))
    if allclose(result, x_0):
        raise WrongAnswer("That is x_0. For the noise, the factors of x_t and v change places.")
    if allclose(result, (1 - alpha_bar).sqrt() * x_t - alpha_bar.sqrt() * v):
        raise WrongAnswer("The sign of v is wrong: insert both formulas, and the terms with x_0 must cancel.")
    if allclose(result, alpha_bar.sqrt() * x_t + (1 - alpha_bar).sqrt() * v):
        raise WrongAnswer("x_t and v have each other's factor.")
    if not torch.allclose(result, noise, atol=1e-6):
        raise WrongAnswer("For a known velocity the result is not the noise in x_t.")
