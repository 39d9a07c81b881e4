"""What checks the reader's functions of text_conditioning.ipynb, against independent values."""

import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, judge, numbered
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.studies import empty_file_checks
from lesson_04_text_conditioning.studies.text_checks import text_forward, transformer_block
from lesson_04_text_conditioning.studies.velocity_checks import (
    convert_output,
    noise_from_velocity,
    velocity,
    velocity_loss,
    x_0_from_velocity,
)
from lesson_04_text_conditioning.text_unet import TextAttention

__all__ = [
    "attention",
    "convert_output",
    "empty_file",
    "merge",
    "noise_from_velocity",
    "text_attention",
    "text_forward",
    "transformer_block",
    "velocity",
    "velocity_loss",
    "x_0_from_velocity",
]


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
        try:
            result = answer(given, pair)
        except IndexError as error:
            raise WrongAnswer(
                f"{tokens} with {pair} raises an IndexError: the last token has no neighbor on its right."
            ) from error
        if given != tokens:
            raise WrongAnswer("The list that was passed in has changed. Build a new list.")
        if not isinstance(result, list):
            raise WrongAnswer(f"It returns {type(result).__name__}; return a list of strings.")
        if "".join(result) != "".join(tokens):
            raise WrongAnswer(f"{tokens} with {pair} became {result}. Merging must not change the text.")
        if result == tokens != wanted:
            raise WrongAnswer(
                f"{tokens} with {pair} stayed as it is; wanted is {wanted}. (A slice of a list never "
                "equals a tuple: compare tuple(tokens[i : i + 2]).)"
            )
        if result != wanted:
            raise WrongAnswer(f"{tokens} with {pair} became {result}; wanted is {wanted}.")


@numbered("4.2")
def attention(answer: Callable) -> None:
    """Compare with PyTorch's attention, and with scores whose exponential is too large for a float."""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 16), torch.randn(6, 16), torch.randn(6, 3)
    shapes = (
        "The shapes in a product do not fit: transpose k (.mT) for scores [Q, K]; the weights go before v."
    )
    with explaining("cannot be multiplied", shapes):
        result = answer(q, k, v)
    expect_shape(result, (4, 3))
    if allclose(result, (q @ k.T).softmax(1) @ v):
        raise WrongAnswer(
            "The scores are not divided. Here d is 16, and scores of random vectors have the standard "
            "deviation 4; it must be 1."
        )
    if allclose(result, (q @ k.T / 16).softmax(1) @ v):
        raise WrongAnswer(
            "The scores are divided by d, their variance. Which r makes the variance of q k / r 1?"
        )
    if allclose(result, (q @ k.T / 6**0.5).softmax(1) @ v):
        raise WrongAnswer("r is the root of the number of keys. It must depend on d, the length of a query.")
    if allclose(result, (q @ k.T / 4).softmax(0) @ v):
        raise WrongAnswer("The softmax runs over the queries. The weights of one query must add up to 1.")
    if allclose(result, (q @ k.T / 4) @ v):
        raise WrongAnswer("The softmax is missing: the weights of one query must add up to 1.")
    if not allclose(result, F.scaled_dot_product_attention(q, k, v)):
        raise WrongAnswer("The result differs from PyTorch's attention. Is it softmax(q k^T / r) v?")
    if not answer(1000 * q, k, v).isfinite().all():
        raise WrongAnswer(
            "Large scores give inf or NaN. `softmax` subtracts the largest score first; use it."
        )
    many_q, many_k, many_v = (torch.stack([x, 2 * x, 3 * x])[None] for x in (q, k, v))  # [1, 3, ...]
    hint = "It is right for q [Q, d], but not for [N, heads, Q, d]: q.shape[-1], .mT, dim=-1 in softmax."
    try:
        with warnings.catch_warnings(
            action="ignore"
        ):  # of .T, which is deprecated for more than two dimensions
            result = answer(many_q, many_k, many_v)
    except (RuntimeError, IndexError) as error:
        raise WrongAnswer(hint) from error
    if not allclose(result, F.scaled_dot_product_attention(many_q, many_k, many_v)):
        raise WrongAnswer(hint)


@numbered("4.4")
def text_attention(answer: Callable) -> None:
    """Compare with the repository's layer, and with layers that lack one part."""
    torch.manual_seed(0)
    layer = TextAttention(8, ADMConfig(num_head_channels=4, num_groups=2), text_width=5).requires_grad_(False)
    nn.init.normal_(layer.proj.weight)
    x, states = torch.randn(2, 8, 3, 3), torch.randn(2, 4, 5)
    needs = "`layer.proj` needs [N, channels, positions]: move the positions to the end (.mT), then flatten."
    along = "Concatenate along the dimension of tokens and positions, which is 2."
    back = "The output of `proj` is [N, channels, positions]. Bring it to the shape of `features`."
    queries = "Only the image has queries: the output has as many positions as `features`."
    with (
        explaining("channels", needs),
        explaining("to conv1d", needs),
        explaining("Sizes of tensors", along),
        explaining("must match the size", back),
        explaining("is invalid for input", queries),
    ):
        result = answer(layer, x, states)
    expect_shape(result, (2, 8, 3, 3))
    (q, k, v), (text_k, text_v) = layer.project_qkv(x), layer.project_text(states)

    def output(keys: Tensor, values: Tensor) -> Tensor:
        attended = F.scaled_dot_product_attention(q, keys, values).mT.flatten(1, 2)  # [N, C, positions]
        return layer.proj(attended).view_as(x)

    both = torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)
    if allclose(result, x + output(k, v)):
        raise WrongAnswer("The text is missing: no position attends to it.")
    if allclose(result, x + output(text_k, text_v)):
        raise WrongAnswer("The positions attend to the text only. They must attend to both, in one softmax.")
    two = x + output(k, v) + output(text_k, text_v)
    bias = layer.proj(torch.zeros(1, 8, 1))[..., None]  # whoever adds before `proj` adds it once
    if allclose(result, two) or allclose(result, two - bias):
        raise WrongAnswer(
            "These are two attentions, added. The softmax must run over tokens and positions together."
        )
    if allclose(result, output(*both)):
        raise WrongAnswer("The skip connection is missing: add `features`.")
    keys, values = torch.cat([k, text_k], 2), torch.cat([v, text_v], 2)
    if allclose(result, x + output(both[0], values)) or allclose(result, x + output(keys, both[1])):
        raise WrongAnswer("Keys and values are in different orders, so a key has the value of another one.")
    attended = F.scaled_dot_product_attention(q, *both).mT.flatten(1, 2)
    if allclose(result, x + layer.proj(attended).mT.reshape(x.shape)):
        raise WrongAnswer("Channels and positions are exchanged: the output of `proj` needs no .mT.")
    if allclose(result, layer.proj(x.flatten(2) + attended).view_as(x)):
        raise WrongAnswer("The features are added before `proj`: add them to its output.")
    ones = layer.proj(torch.ones(1, 8, 9)).view(1, 8, 3, 3)  # all values 1: weights that add up to 1 give 1
    flat = TextAttention(8, ADMConfig(num_head_channels=4, num_groups=2), text_width=5).requires_grad_(False)
    flat.load_state_dict(layer.state_dict())
    flat.project_qkv = lambda x: (q, k, torch.ones_like(v))  # type: ignore[method-assign]
    flat.project_text = lambda context: (text_k, torch.ones_like(text_v))  # type: ignore[method-assign]
    if not allclose(answer(flat, x, states) - x, ones.expand_as(x)):
        raise WrongAnswer("The weights of a position must add up to 1 over the 4 tokens and the 9 positions.")
    if not allclose(result, x + output(*both)):
        raise WrongAnswer(
            "The weights add up to 1, but the output differs from that of TextAttention. Are the heads put "
            "together as [N, channels, positions] before `proj`?"
        )


def empty_file(attention_fn: Callable, encoder: Callable, read_text: Callable, loss: Callable) -> None:
    """Print what is wrong with four functions that were written without looking."""
    print(f"attention: {judge(attention_fn, attention)}")
    print(f"encoder: {judge(encoder, empty_file_checks.encoder)}")
    print(f"read_text: {judge(read_text, partial(empty_file_checks.read_text, encoder=encoder))}")
    print(f"loss: {judge(loss, empty_file_checks.loss)}")
