"""The classic bugs of lesson 5. None of them crashes; `experiments.py mistakes` shows what each does."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from common.protocols import Denoiser, Tokenizer
from lesson_04_text_conditioning.model import encode_prompts
from lesson_05_cfg.guidance import cfg_denoiser


def drop_whole_batches(mask: Bool[Tensor, "n length"]) -> Bool[Tensor, "n length"]:
    """Drop all captions of a batch, or none. The bug: one random number per batch, not per caption."""
    return mask & (torch.rand(1, device=mask.device) >= 0.1)


def against_nothing(
    network: Any, tokenizer: Tokenizer, prompts: Sequence[str], guidance_scale: float
) -> Denoiser:
    """Return a denoiser guided away from "nothing". The bug: training had the empty caption there."""
    text = encode_prompts(network, tokenizer, prompts)
    wrong = encode_prompts(network, tokenizer, ["nothing"] * len(prompts))
    return cfg_denoiser(network, text, wrong, guidance_scale)


def variance_guided_too(
    network: Any, tokenizer: Tokenizer, prompts: Sequence[str], guidance_scale: float
) -> Denoiser:
    """Return a guided denoiser. The bug: the formula is applied to the learned variance, too."""
    text = encode_prompts(network, tokenizer, prompts)
    empty = encode_prompts(network, tokenizer, [""] * len(prompts))

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        cond, uncond = network(x_t, t, text), network(x_t, t, empty)
        return uncond + guidance_scale * (cond - uncond)

    return denoiser
