"""The classic bugs of lesson 5. None of them crashes; `experiments.py mistakes` shows what each does."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from common.protocols import Denoiser, Tokenizer
from common.sampling import last_sample
from lesson_01_ddpm.diffusion import ddpm_sample
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_02_improved_ddpm.variational_bound import learned_range
from lesson_04_text_conditioning.model import encode_prompts
from lesson_05_cfg.guidance import cfg_denoiser, prompt_denoiser


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


def exchanged(network: Any, tokenizer: Tokenizer, prompts: Sequence[str], guidance_scale: float) -> Denoiser:
    """Return a denoiser guided away from its prompts. The bug: the two predictions are exchanged."""
    text = encode_prompts(network, tokenizer, prompts)
    empty = encode_prompts(network, tokenizer, [""] * len(prompts))
    return cfg_denoiser(network, empty, text, guidance_scale)


def buggy_samples(
    network: Any, tokenizer: Tokenizer, prompts: Sequence[str], guidance_scale: float = 3, steps: int = 25
) -> dict[str, Float[Tensor, "n c h w"]]:
    """Return ancestral samples of four guided denoisers, all from the same noise, for exercise 5.5."""
    variants: dict[str, Callable[..., Denoiser]] = {
        "A": against_nothing,
        "B": variance_guided_too,
        "C": prompt_denoiser,
        "D": exchanged,
    }
    process, samples = make_diffusion().respace_evenly(steps), {}
    for name, make_denoiser in variants.items():
        generator = torch.Generator().manual_seed(3)
        x_T = torch.randn(len(prompts), *network.image_shape, generator=generator)
        denoiser = make_denoiser(network, tokenizer, prompts, guidance_scale)
        samples[name] = last_sample(ddpm_sample(process, denoiser, x_T, generator, learned_range))
    return samples
