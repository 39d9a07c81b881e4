"""One correct answer for each exercise of text_conditioning.ipynb; the notebook falls back on them."""

from collections.abc import Sequence

import torch
from torch import Tensor


def merge(tokens: Sequence[str], pair: tuple[str, str]) -> list[str]:
    """Exercise 4.1: join the two tokens of `pair` wherever they are neighbours, from left to right."""
    merged: list[str] = []
    i = 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(tokens[i] + tokens[i + 1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


def look_up(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exercise 4.2: return, for each query, the mean of the values, weighted by how well the keys match."""
    scores = q @ k.T / k.shape[1] ** 0.5
    return scores.softmax(1) @ v


def embed_caption(tokens: Tensor, positions: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
    """Exercise 4.3: return token + position where the mask is True, and padding elsewhere."""
    return torch.where(mask[..., None], tokens + positions, padding)


def add_text(k: Tensor, v: Tensor, text_k: Tensor, text_v: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 4.4: return the keys and values of text and pixels together, text first."""
    return torch.cat([text_k, k], 2), torch.cat([text_v, v], 2)


def velocity(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Exercise 4.5: return the velocity."""
    return alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * x_0


def noise_from_velocity(x_t: Tensor, v: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Exercise 4.6: return the noise that belongs to a velocity."""
    return (1 - alpha_bar_t).sqrt() * x_t + alpha_bar_t.sqrt() * v
