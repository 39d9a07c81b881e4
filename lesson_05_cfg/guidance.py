"""Classifier-free guidance (Ho & Salimans 2022; GLIDE: Nichol et al. 2022, section 2.3)."""

import torch


def drop_captions(mask, probability):
    """Caption dropout: each sample, by itself, gets the empty caption (all padding) with this probability.

    mask: bool [N, context]. Where it is False the text transformer sees its padding embedding, whatever the
    token.
    """
    dropped = torch.rand(len(mask), device=mask.device) < probability
    return mask & ~dropped[:, None]


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
