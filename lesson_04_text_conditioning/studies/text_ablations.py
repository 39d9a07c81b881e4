"""What lesson 4's experiments compare: networks that see a part of the caption, or an index in its place."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from common.digits.captions import CAPTIONS, NUM_PHRASINGS
from common.protocols import Denoiser, Loss, LossAtT, TextToImageNetwork, Tokenizer
from lesson_01_ddpm.diffusion import training_loss
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.model import encode_prompts
from lesson_04_text_conditioning.text_transformer import TextEncoding

TextFilter: TypeAlias = Callable[[TextEncoding], TextEncoding]  # what the UNet sees of an encoded caption


def whole_text(text: TextEncoding) -> TextEncoding:
    """Return the encoded caption as it is."""
    return text


def pooled_only(text: TextEncoding) -> TextEncoding:
    """Replace the token states, which the attention layers see, by zeros."""
    return text._replace(token_states=torch.zeros_like(text.token_states))


def tokens_only(text: TextEncoding) -> TextEncoding:
    """Replace the pooled embedding, which is added to that of the timestep, by zeros."""
    return text._replace(pooled=torch.zeros_like(text.pooled))


def loss_with_text(loss: LossAtT, text_filter: TextFilter = whole_text) -> Loss:
    """Return the training loss (network, x_0, tokens, mask) -> [N] of a network that sees filtered text."""

    def filtered_loss(network: TextToImageNetwork, x_0: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        text = text_filter(network.encode_text(tokens, mask))
        return training_loss(loss, make_diffusion(), partial(network, text=text), x_0)

    return filtered_loss


def conditional_denoiser(
    network: TextToImageNetwork,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    text_filter: TextFilter = whole_text,
) -> Denoiser:
    """Return the denoiser of one sample per prompt, without guidance."""
    return partial(network, text=text_filter(encode_prompts(network, tokenizer, prompts)))


class PairIndices:
    """Replaces a tokenizer: the only token of a caption is the index of its digit and colour."""

    context_length, vocab_size = 1, len(CAPTIONS) // NUM_PHRASINGS

    def encode(self, captions: Sequence[str]) -> tuple[Int[Tensor, "n 1"], Bool[Tensor, "n 1"]]:
        """Return indices and a mask. Raises ValueError for a caption that is not in CAPTIONS."""
        tokens = torch.tensor([[CAPTIONS.index(caption) // NUM_PHRASINGS] for caption in captions])
        return tokens, torch.ones_like(tokens, dtype=torch.bool)
