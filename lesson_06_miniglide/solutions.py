"""One correct answer for each exercise of lesson 6's notebooks; the notebooks fall back on them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.sampling import last_sample
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.schedules import cosine_betas
from lesson_04_text_conditioning.model import encode_prompts
from lesson_05_cfg.dpm_solver import dpmpp_2m_sample
from lesson_06_miniglide.networks.upsampler import area_downsample


def shift_schedule(alpha_bar: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Exercise 6.2: return the schedule for images k times as large, and the factor for their k x k means."""
    snr = alpha_bar / (1 - alpha_bar) / k**2
    shifted = snr / (1 + snr)
    return shifted, (alpha_bar / shifted).sqrt()


def load_batch(folder: Path) -> tuple[Tensor, list[str]]:
    """Exercise 6.1: return the images [N, 3, 64, 64] of a folder in [-1, 1], and their captions."""
    images, captions = [], []
    for path in sorted(folder.glob("*.jpg")):
        pixels = np.array(Image.open(path).convert("RGB").resize((64, 64)))
        images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
        captions.append(path.with_suffix(".txt").read_text(encoding="utf-8").strip())
    return torch.stack(images), captions


def on_patches(network: Callable[..., Tensor], x_t: Tensor, t: Tensor, size: int) -> Tensor:
    """Exercise 6.3: return the output [N, 6, H, W] of a network that sees patches of size x size pixels."""
    return F.pixel_shuffle(network(F.pixel_unshuffle(x_t, size), t), size)


def text_to_image_loss(model: Any, x_0: Tensor, tokens: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Exercise 6.4: return the loss of each image [N]: the error of the velocity, with dropped captions."""
    network, process = model.network, model.process
    n = len(x_0)
    keep = torch.rand(n) >= dropout
    text = network.encode_text(tokens, mask & keep[:, None])
    t, noise = torch.randint(process.num_timesteps, (n,)), torch.randn_like(x_0)
    x_t = process.q_sample(x_0, t, noise)
    v_hat = network.network(x_t, t, text=text)[:, :3]
    alpha_bar_t = process.alpha_bar[t].float()[:, None, None, None]
    v = alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * x_0
    return (v_hat - v).square().mean((1, 2, 3))


@torch.no_grad()
def text_to_image(model: Any, tokenizer: Any, prompts: Sequence[str], scale: float, steps: int) -> Tensor:
    """Exercise 6.4: return one guided sample per prompt."""
    network, n = model.network, len(prompts)
    cond = encode_prompts(network, tokenizer, prompts)
    uncond = encode_prompts(network, tokenizer, [""] * n)

    def denoiser(x_t: Tensor, t: Tensor) -> Tensor:
        eps_cond, eps_uncond = network(x_t, t, text=cond)[:, :3], network(x_t, t, text=uncond)[:, :3]
        return eps_uncond + scale * (eps_cond - eps_uncond)

    x_T = torch.randn(n, *network.image_shape)
    return last_sample(dpmpp_2m_sample(model.process.respace_evenly(steps), denoiser, x_T))


def accumulate_gradients(
    network: nn.Module, loss_fn: Callable[..., Tensor], batch: Sequence[Tensor], parts: int
) -> None:
    """Exercise 6.5: compute the gradient of a batch's mean loss in `parts` micro-batches."""
    n = len(batch[0])
    network.zero_grad()
    for micro_batch in zip(*(x.chunk(parts) for x in batch)):
        loss = loss_fn(network, *micro_batch)  # [n of the micro-batch]
        (loss.sum() / n).backward()


def test_range(x_0: Tensor) -> None:
    """Exercise 6.6: fail unless images are scaled to [-1, 1], and not to [0, 1] or [0, 255]."""
    assert x_0.min() < 0 and x_0.abs().max() <= 1


def test_every_timestep(draw_t: Callable[[int], Tensor]) -> None:
    """Exercise 6.6: fail unless each of the timesteps 0 to 999 is drawn, and no other."""
    assert draw_t(100_000).unique().tolist() == list(range(1000))


def test_captions_dropped(drop: Callable[[Tensor], Tensor]) -> None:
    """Exercise 6.6: fail unless each caption loses all of its tokens with a probability of 20 %."""
    mask = torch.ones(2000, 24, dtype=torch.bool)
    dropped = ~drop(mask).any(1)
    assert 0.15 < dropped.float().mean() < 0.25


def test_finite(network: nn.Module) -> None:
    """Exercise 6.6: fail if any parameter is NaN or infinite."""
    assert all(parameter.isfinite().all() for parameter in network.parameters())


def test_schedule(process: GaussianDiffusion) -> None:
    """Exercise 6.6: fail unless the 2x2 means of x_t have the SNR of the cosine schedule."""
    t, x_0 = torch.full((64,), 500), torch.ones(64, 3, 64, 64)
    means = F.avg_pool2d(process.q_sample(x_0, t, torch.randn_like(x_0)), 2)
    alpha_bar = GaussianDiffusion(cosine_betas(1000)).alpha_bar[500]
    assert abs(means.mean() ** 2 / means.var() * (1 - alpha_bar) / alpha_bar - 1) < 0.05


def upsampler_inputs(process: GaussianDiffusion, image: Tensor, level: Tensor) -> dict[str, Tensor]:
    """Exercise 6.7: return what an upsampler sees of images in training: low resolution, noise, its level."""
    low_res = area_downsample(image, 16)
    return {"low_res": process.q_sample(low_res, level, torch.randn_like(low_res)), "noise_level": level}


def upsampler_loss(
    network: Any, process: GaussianDiffusion, image: Tensor, text: Any, t: Tensor, level: Tensor
) -> Tensor:
    """Exercise 6.7: return an upsampler's error of the velocity, for each image [N]."""
    noise, alpha_bar_t = torch.randn_like(image), process.alpha_bar[t].float()[:, None, None, None]
    v = alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * image
    x_t = process.q_sample(image, t, noise)
    v_hat = network(x_t, t, text, **upsampler_inputs(process, image, level))[:, :3]
    return (v_hat - v).square().mean((1, 2, 3))


def insert_known(sampled: Tensor, image: Tensor, keep: Tensor, alpha_bar: float, noise: Tensor) -> Tensor:
    """Exercise 6.10: return x_{t-1} with the known pixels of the image, at its noise level."""
    known = alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * noise
    return keep * known + (1 - keep) * sampled


def repaint_step(
    reverse_step: Callable, insert: Callable, forward_step: Callable, x_t: Tensor, repeats: int
) -> Tensor:
    """Exercise 6.10: take a reverse step several times, going back by a forward step in between."""
    for i in range(repeats):
        x_prev = insert(reverse_step(x_t))
        if i < repeats - 1:
            x_t = forward_step(x_prev)
    return x_prev


def expand_inputs(weight: Tensor, more: int) -> Tensor:
    """Exercise 6.11: return a convolution's weight for `more` further inputs, which change nothing."""
    out, _, height, width = weight.shape
    return torch.cat([weight, torch.zeros(out, more, height, width)], 1)


def inpainting_inputs(image: Tensor, keep: Tensor) -> Tensor:
    """Exercise 6.11: return the four further channels that an inpainting network sees."""
    return torch.cat([image * keep, keep], 1)


def sdedit_start(image: Tensor, strength: float, alpha_bar: Tensor, noise: Tensor) -> tuple[int, Tensor]:
    """Exercise 6.12: return the timestep where SDEdit starts, and the image with its noise."""
    t = max(1, round(strength * len(alpha_bar))) - 1
    return t, alpha_bar[t] ** 0.5 * image + (1 - alpha_bar[t]) ** 0.5 * noise


def clip_loss(image_embeds: Tensor, text_embeds: Tensor, scale: float | Tensor) -> Tensor:
    """Exercise 6.15: return CLIP's loss for embeddings [N, D]; row i of one belongs to row i of the other."""
    logits = scale * F.normalize(image_embeds, dim=1) @ F.normalize(text_embeds, dim=1).T
    correct = torch.arange(len(image_embeds))
    return (F.cross_entropy(logits, correct) + F.cross_entropy(logits.T, correct)) / 2


def similarity_gradient(
    encode_image: Callable[..., Tensor], text_embeds: Tensor, x_t: Tensor, t: Tensor, scale: float
) -> Tensor:
    """Exercise 6.16: return scale * the gradient of each image's cosine with its caption."""
    with torch.enable_grad():
        x_t = x_t.detach().requires_grad_(True)
        cosines = (encode_image(x_t, t) * text_embeds).sum(1)
        return scale * torch.autograd.grad(cosines.sum(), x_t)[0]
