"""Classifier-free guidance (Ho & Salimans 2022; GLIDE: Nichol et al. 2022, section 2.3)."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from common.conditioning import batch_size, concatenate, expand
from common.protocols import Conditioning, Denoiser, Loss, LossAtT, Process, TextToImageNetwork, Tokenizer
from lesson_01_ddpm.diffusion import training_loss, uniform_timesteps
from lesson_04_text_conditioning.model import encode_prompts

ConditionalNetwork = Callable[[Tensor, Tensor, Conditioning], Tensor]  # (x_t, t, conditioning) -> output
# (process, network, x_0) -> the image to draw, and the network's inputs besides x_t, t and the caption
Task = Callable[[Any, Any, Tensor], tuple[Tensor, dict[str, Any]]]


def drop_captions(mask: Bool[Tensor, "n length"], probability: float) -> Bool[Tensor, "n length"]:
    """Replace each caption independently by the empty one with this probability (caption dropout).

    Where the mask is False, the text encoder sees its padding embedding instead of the token.
    """
    dropped = torch.rand(len(mask), device=mask.device) < probability
    return mask & ~dropped[:, None]


def text_to_image_task(diffusion: Process, network: Any, x_0: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """The task of all lessons so far: draw x_0, given its caption and nothing else."""
    return x_0, {}


def caption_loss(
    loss: LossAtT,
    diffusion: Process,
    drop_fn: Callable[[Tensor], Tensor],
    task: Task = text_to_image_task,
    sample_t: Callable[[int, int], Tensor] = uniform_timesteps,
) -> Loss:
    """Return the training loss (network, x_0, tokens, mask) -> [N] of a text-to-image network.

    loss: at given timesteps, such as `loss_hybrid_velocity`. drop_fn: mask -> mask, for caption dropout.
    sample_t: (n, num_timesteps) -> int64 [n].
    """

    def training_loss_of_captions(
        network: TextToImageNetwork, x_0: Tensor, tokens: Tensor, mask: Tensor
    ) -> Tensor:
        x_0, unet_kwargs = task(diffusion, network, x_0)
        text = network.encode_text(tokens, drop_fn(mask))
        return training_loss(loss, diffusion, partial(network, text=text, **unet_kwargs), x_0, sample_t)

    return training_loss_of_captions


def cfg_denoiser(
    network: ConditionalNetwork, cond: Conditioning, uncond: Conditioning, guidance_scale: float
) -> Denoiser:
    """Return a denoiser that follows its conditioning more closely than the network alone:

        eps = eps_uncond + s (eps_cond - eps_uncond)

    network: (x_t, t, conditioning) -> [N, C or more, H, W]. cond, uncond: trees of tensors [N, ...];
    uncond is the same with empty captions. s = 0 ignores the captions and s = 1 is the plain conditional
    model, each in one evaluation per step; other scales evaluate both branches in one batch of 2N. Further
    channels, a learned variance, are those of the conditional branch: v is not a score and is not guided.
    """
    if guidance_scale in (0, 1):
        chosen = cond if guidance_scale == 1 else uncond
        return lambda x_t, t: network(x_t, t, chosen)
    both = concatenate(cond, uncond)

    def denoiser(x_t: Float[Tensor, "n c *size"], t: Int[Tensor, "n"]) -> Float[Tensor, "n out_c *size"]:
        eps_cond, eps_uncond = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
        c = x_t.shape[1]
        eps = eps_uncond[:, :c] + guidance_scale * (eps_cond[:, :c] - eps_uncond[:, :c])
        return torch.cat([eps, eps_cond[:, c:]], 1)

    return denoiser


def cfg_interval_denoiser(
    network: ConditionalNetwork,
    cond: Conditioning,
    uncond: Conditioning,
    guidance_scale: float,
    interval: tuple[int, int],
) -> Denoiser:
    """Return `cfg_denoiser` at timesteps low <= t <= high, and the plain conditional model elsewhere.

    At high noise guidance costs diversity, at low noise only time (Kynkäänniemi et al. 2024). All samples of
    a batch must be at the same t, as in every sampler here.
    """
    (low, high), plain = interval, cfg_denoiser(network, cond, uncond, 1)
    inside = cfg_denoiser(network, cond, uncond, guidance_scale)
    return lambda x_t, t: inside(x_t, t) if low <= t[0] <= high else plain(x_t, t)


def prompt_conditioning(
    network: TextToImageNetwork, tokenizer: Tokenizer, prompts: Sequence[str], **unet_kwargs: Tensor
) -> tuple[Conditioning, Conditioning]:
    """Return the conditioning on these prompts and on as many empty captions.

    unet_kwargs: further inputs of the network by name, [N, ...] each, the same in both.
    """
    text = encode_prompts(network, tokenizer, prompts)
    empty = expand(encode_prompts(network, tokenizer, [""]), batch_size(text))
    device = next(network.parameters()).device
    inputs = {name: x.to(device) for name, x in unet_kwargs.items()}
    return {"text": text, **inputs}, {"text": empty, **inputs}


def prompt_denoiser(
    network: TextToImageNetwork,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    guidance_scale: float = 1.0,
    interval: tuple[int, int] | None = None,
    **unet_kwargs: Tensor,
) -> Denoiser:
    """Return the guided denoiser for one sample per prompt.

    interval: timesteps at which there is guidance; None means all. unet_kwargs: as in `prompt_conditioning`.
    """
    cond, uncond = prompt_conditioning(network, tokenizer, prompts, **unet_kwargs)

    def conditional(x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        return network(x_t, t, **conditioning)

    if interval:
        return cfg_interval_denoiser(conditional, cond, uncond, guidance_scale, interval)
    return cfg_denoiser(conditional, cond, uncond, guidance_scale)


def dynamic_threshold(x_0: Float[Tensor, "n c h w"], percentile: float = 99.5) -> Float[Tensor, "n c h w"]:
    """Rescale an oversaturated predicted x_0; a `denoised_fn` (Saharia et al. 2022, section 2.3).

    a is that percentile of |x_0| in each sample, but at least 1; x_0 is clipped to [-a, a] and divided by a.
    Values that guidance pushed out of range keep their contrast, which clipping to [-1, 1] would lose.
    """
    a = x_0.abs().flatten(1).quantile(percentile / 100, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return x_0.clamp(-a, a) / a
