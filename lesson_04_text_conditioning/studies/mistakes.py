"""The classic bugs of lesson 4. None of them crashes; `experiments.py mistakes` shows what each does."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common.protocols import TextToImageNetwork
from lesson_04_text_conditioning.studies.text_ablations import loss_with_text
from lesson_04_text_conditioning.velocity import loss_hybrid_velocity


def loss_with_random_padding(
    vocab_size: int,
    network: TextToImageNetwork,
    x_0: Float[Tensor, "n c h w"],
    tokens: Int[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
) -> Float[Tensor, "n"]:
    """Return the training loss with random tokens as padding. The bug: the mask is forgotten in training."""
    tokens = torch.where(mask, tokens, torch.randint_like(tokens, vocab_size))
    return loss_with_text(loss_hybrid_velocity)(network, x_0, tokens, torch.ones_like(mask))


def loss_with_inverted_mask(
    network: TextToImageNetwork,
    x_0: Float[Tensor, "n c h w"],
    tokens: Int[Tensor, "n length"],
    mask: Bool[Tensor, "n length"],
) -> Float[Tensor, "n"]:
    """Return the training loss of a network that reads the padding and not the caption."""
    return loss_with_text(loss_hybrid_velocity)(network, x_0, tokens, ~mask)
