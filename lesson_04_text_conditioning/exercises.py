"""Exercises of lesson 4. Fill in a function, then see what its check says:

    python lesson_04_text_conditioning/exercises.py

No training is needed. The answers stand in solutions.ipynb.
"""

import torch
import torch.nn.functional as F

from common.exercises import WrongAnswer, allclose, run_checks

# -- 1. Merge a pair        topic: byte-pair encoding; easy; 10 minutes


def merge(tokens, pair):
    """tokens: a list of strings. Wherever the two strings of `pair` follow each other, join them to one.

    From left to right, and what has just been joined is not joined again: ["a", "a", "a"] with ("a", "a")
    gives ["aa", "a"].
    """
    raise NotImplementedError


def check_merge(answer=merge):
    """Words whose merges are known."""
    cases = [
        (list("seven"), ("s", "e"), ["se", "v", "e", "n"]),
        (list("seven zero"), ("e", "r"), [*"seven", " ", "z", "er", "o"]),
        (["se", "v", "e", "n"], ("e", "n"), ["se", "v", "en"]),
        (list("zero"), ("x", "y"), list("zero")),
        (["a", "a", "a"], ("a", "a"), ["aa", "a"]),
        (list("see"), ("e", "e"), ["s", "ee"]),
    ]
    for tokens, pair, wanted in cases:
        ours = list(answer(list(tokens), pair))
        if "".join(ours) != "".join(tokens):
            raise WrongAnswer(f"{tokens} with {pair} became {ours}: merging must not change what is written")
        if ours != wanted:
            raise WrongAnswer(f"{tokens} with {pair} became {ours}, wanted {wanted}")


# -- 2. A soft look-up        topic: attention; medium; 15 minutes


def look_up(q, k, v):
    """q [Q, d], k [K, d], v [K, c] -> [Q, c]: a mean of the values, weighted by softmax(q . k / sqrt(d)).

    Hint: the weights of one query add up to 1, and a large q . k must not overflow; `softmax` sees to both.
    """
    raise NotImplementedError


def check_look_up(answer=look_up):
    """Against torch's own, and with scores whose exponential is too large for a float."""
    torch.manual_seed(0)
    q, k, v = torch.randn(4, 16), torch.randn(6, 16), torch.randn(6, 3)
    ours, wanted = answer(q, k, v), F.scaled_dot_product_attention(q, k, v)
    if ours.shape != wanted.shape:
        raise WrongAnswer(
            f"the answer has shape {tuple(ours.shape)}, wanted {tuple(wanted.shape)}: a row a query"
        )
    if allclose(ours, (q @ k.T).softmax(1) @ v):
        raise WrongAnswer("the scores are not divided by sqrt(d); in many dimensions one key would take all")
    if allclose(ours, (q @ k.T / 4).softmax(0) @ v):
        raise WrongAnswer("the softmax runs over the queries; each query shares itself out among the keys")
    if not allclose(ours, wanted):
        raise WrongAnswer(
            f"differs from scaled_dot_product_attention by up to {(ours - wanted).abs().max():.3f}"
        )
    if not answer(1000 * q, k, v).isfinite().all():
        raise WrongAnswer("large scores give inf or nan: subtract the largest before exp, or use softmax")


# -- 3. What padding says        topic: text transformer; easy; 5 minutes


def read(token_embedding, position, padding, mask):
    """The transformer's input [N, context, width]: token + position where the mask is True, else padding.

    token_embedding: [N, context, width]. position, padding: [context, width]. mask: bool [N, context].
    """
    raise NotImplementedError


def check_read(answer=read):
    """What stands under the padding must not matter, and padding replaces the position too."""
    torch.manual_seed(0)
    tokens, position, padding = torch.randn(2, 4, 3), torch.randn(4, 3), torch.randn(4, 3)
    mask = torch.tensor([[True, True, False, False], [False] * 4])
    ours = answer(tokens, position, padding, mask)
    if ours.shape != tokens.shape:
        raise WrongAnswer(f"the input has shape {tuple(ours.shape)}, wanted {tuple(tokens.shape)}")
    junk = torch.where(mask[..., None], tokens, torch.randn(2, 4, 3))
    if not allclose(answer(junk, position, padding, mask), ours):
        raise WrongAnswer("the token under the padding still counts: padding must replace it")
    if allclose(ours[1], position + padding):
        raise WrongAnswer("padding replaces token and position; here the position is added to it")
    if allclose(ours[1], tokens[1] + position):
        raise WrongAnswer("the mask is inverted: True is where there is a token")
    if not (allclose(ours[1], padding) and allclose(ours[0, :2], (tokens[0] + position)[:2])):
        raise WrongAnswer(
            "where the mask is True: token + position; where it is False: padding, and nothing else"
        )


# -- 4. Words among the pixels        topic: cross-attention; hard; 15 minutes


def look_around(q, pixel_k, pixel_v, text_k, text_v):
    """Every pixel looks at all pixels and all words, in *one* softmax. -> [N, pixels, d].

    q, pixel_k, pixel_v: [N, pixels, d]. text_k, text_v: [N, words, d].
    """
    raise NotImplementedError


def check_look_around(answer=look_around):
    """Against the sum written out, key by key."""
    torch.manual_seed(0)
    q, pixel_k, pixel_v = torch.randn(3, 2, 9, 8).unbind(0)
    text_k, text_v = torch.randn(2, 2, 5, 8).unbind(0)
    ours = answer(q, pixel_k, pixel_v, text_k, text_v)
    attention = F.scaled_dot_product_attention
    apart = attention(q, pixel_k, pixel_v) + attention(q, text_k, text_v)
    if ours.shape == apart.shape and (allclose(ours, apart) or allclose(ours, apart / 2)):
        raise WrongAnswer(
            "two softmaxes, added: then words get the same share always; let them compete in one"
        )
    if allclose(ours, attention(q, pixel_k, pixel_v)):
        raise WrongAnswer("nobody looks at the words")
    wanted = torch.zeros_like(q)
    for n in range(2):
        for i in range(9):
            weights = [(q[n, i] @ key / 8**0.5).exp() for key in (*text_k[n], *pixel_k[n])]
            values = (*text_v[n], *pixel_v[n])
            wanted[n, i] = sum(w * value for w, value in zip(weights, values)) / sum(weights)
    if ours.shape != wanted.shape or not allclose(ours, wanted):
        raise WrongAnswer(
            "keys and values must be joined in the same order, along the places, not the channels"
        )


CHECKS = [check_merge, check_look_up, check_read, check_look_around]

if __name__ == "__main__":
    run_checks(CHECKS)
