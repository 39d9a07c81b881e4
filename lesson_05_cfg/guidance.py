"""Classifier-free guidance (Ho & Salimans 2022; GLIDE: Nichol et al. 2022, section 2.3)."""

from functools import partial

import torch

from lesson_01_ddpm.diffusion import loss_at_random_t, uniform


def drop_captions(mask, probability):
    """Caption dropout: each sample, by itself, gets the empty caption (all padding) with this probability.

    mask: bool [N, context]. Where it is False the text transformer sees its padding embedding, whatever the
    token.
    """
    dropped = torch.rand(len(mask), device=mask.device) < probability
    return mask & ~dropped[:, None]


def draw(diffusion, network, x_0):
    """The task of all lessons so far: draw x_0, given its caption and nothing else."""
    return x_0, {}


def loss_of_captions(at_t, diffusion, drop, task=draw, draw_t=uniform):
    """(network, x_0, tokens, mask) -> [N]: the loss `at_t` at random t, with the captions that `drop` leaves.

    at_t: (diffusion, denoiser, x_0, t, noise) -> [N]. drop: mask -> mask. task: (diffusion, network, x_0) ->
    what is to be drawn, and what the network sees of it, by name. draw_t: (N, num_timesteps) -> t [N].
    """

    def loss(network, x_0, tokens, mask):
        x_0, seen = task(diffusion, network, x_0)
        text = network.encode_text(tokens, drop(mask))
        return loss_at_random_t(at_t, diffusion, partial(network, text=text, **seen), x_0, draw_t)

    return loss


def guided(network, text, empty, guidance_scale):
    """A denoiser (x_t, t) -> output that follows the caption more than the network alone does:

        eps = eps_uncond + s (eps_cond - eps_uncond)

    network: (x_t, t, text) -> [N, C or 2C, H, W]. text, empty: the encoded captions and as many empty ones,
    tuples of tensors [N, ...]. s = 0 ignores the caption, s = 1 is the plain conditional model, each one call
    for N; any other s is one call for 2N. The variance channels are the conditional branch's: v is no score,
    and is not guided.
    """
    if guidance_scale in (0, 1):
        chosen = text if guidance_scale == 1 else empty
        return lambda x_t, t: network(x_t, t, chosen)
    both = type(text)(*(torch.cat(pair) for pair in zip(text, empty)))

    def denoiser(x_t, t):
        output = network(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        cond, uncond = output.chunk(2)
        c = x_t.shape[1]
        eps = uncond[:, :c] + guidance_scale * (cond[:, :c] - uncond[:, :c])
        return torch.cat([eps, cond[:, c:]], 1)

    return denoiser


def guided_between(network, text, empty, guidance_scale, interval):
    """`guided` at timesteps low <= t <= high, the plain conditional model (one call for N) at all others.

    interval: (low, high). Guidance at high noise costs diversity, at low noise it only costs time
    (Kynkaanniemi et al. 2024). All samples of a call must be at the same t, as in every sampler here.
    """
    (low, high), plain = interval, guided(network, text, empty, 1)
    inside = guided(network, text, empty, guidance_scale)
    return lambda x_t, t: inside(x_t, t) if low <= t[0] <= high else plain(x_t, t)


def dynamic_threshold(x_0, percentile=99.5):
    """Imagen's remedy for saturated pixels (Saharia et al. 2022, section 2.3), a `bound` for any sampler.

    s is that percentile of |x_0| over each sample's values, but at least 1; x_0 is cut to [-s, s] and divided
    by s. So what guidance pushed out of range comes back with its contrasts, where clipping would lose them.
    """
    s = x_0.abs().flatten(1).quantile(percentile / 100, dim=1).clamp(min=1).view(-1, 1, 1, 1)
    return x_0.clamp(-s, s) / s
