"""One correct answer for each exercise of text_conditioning.ipynb; the notebook falls back on them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_03_adm.solutions import split_heads
from lesson_04_text_conditioning.text_transformer import TextTransformer, TransformerBlock
from lesson_04_text_conditioning.text_unet import TextAttention


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


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Exercise 4.2: return, for each query, the mean of the values, weighted by how well the keys match."""
    scores = q @ k.mT / q.shape[-1] ** 0.5
    return scores.softmax(-1) @ v


def transformer_block(block: TransformerBlock, x: Tensor) -> Tensor:
    """Exercise 4.3: return the output of a block of the text transformer."""
    qkv = split_heads(block.qkv(block.ln_1(x)), block.num_heads)  # of each head: its q, its k, its v
    q, k, v = qkv.chunk(3, -1)
    x = x + block.proj(attention(q, k, v).transpose(1, 2).flatten(2))
    return x + block.fc_2(F.gelu(block.fc_1(block.ln_2(x))))


def text_forward(transformer: TextTransformer, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Exercise 4.3: return the pooled embedding and the token states."""
    x = transformer.token_embedding(tokens) + transformer.positional_embedding
    token_states = transformer.transform(torch.where(mask[..., None], x, transformer.padding_embedding))
    return transformer.proj(token_states[:, -1]), token_states


def text_attention(layer: TextAttention, features: Tensor, token_states: Tensor) -> Tensor:
    """Exercise 4.4: return the output of an attention layer in which positions also attend to the text."""
    q, k, v = layer.project_qkv(features)
    text_k, text_v = layer.project_text(token_states)
    attended = attention(q, torch.cat([text_k, k], 2), torch.cat([text_v, v], 2))
    attended = attended.mT.flatten(1, 2)
    return features + layer.proj(attended).view_as(features)


def velocity(x_0: Tensor, noise: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Exercise 4.5: return the velocity."""
    return alpha_bar_t.sqrt() * noise - (1 - alpha_bar_t).sqrt() * x_0


def x_0_from_velocity(x_t: Tensor, v: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Exercise 4.5: return the image that belongs to a velocity."""
    return alpha_bar_t.sqrt() * x_t - (1 - alpha_bar_t).sqrt() * v


def noise_from_velocity(x_t: Tensor, v: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """Exercise 4.5: return the noise that belongs to a velocity."""
    return (1 - alpha_bar_t).sqrt() * x_t + alpha_bar_t.sqrt() * v


def convert_output(wrapper: Any, x_t: Tensor, t: Tensor, **conditioning: Any) -> Tensor:
    """Exercise 4.5: return the noise and, unchanged, the channels of the variance."""
    output = wrapper.network(x_t, t, **conditioning)
    eps_hat = noise_from_velocity(x_t, output[:, :3], wrapper.alpha_bar[t].view(-1, 1, 1, 1))
    return torch.cat([eps_hat, output[:, 3:]], 1)


def velocity_loss(
    network: Any, diffusion: GaussianDiffusion, x_0: Tensor, tokens: Tensor, mask: Tensor
) -> Tensor:
    """Exercise 4.6: return the mean squared error of the velocity at a random timestep per image."""
    t, noise = torch.randint(1000, (len(x_0),)), torch.randn_like(x_0)
    text = network.encode_text(tokens, mask)
    output = network(diffusion.q_sample(x_0, t, noise), t, text=text)
    target = velocity(x_0, noise, diffusion.alpha_bar[t].float().view(-1, 1, 1, 1))
    return (output[:, :3] - target).square().mean()
