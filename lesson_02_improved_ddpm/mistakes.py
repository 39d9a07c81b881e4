"""The classic bugs of lesson 2. None of them crashes; `experiments.py mistakes` shows what each does."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.protocols import Denoiser, LossAtT
from lesson_01_ddpm.diffusion import GaussianDiffusion, squared_error
from lesson_02_improved_ddpm.variational_bound import learned_range, vb_terms_bpd, vlb_for_variance


def weighted_hybrid(weight: float) -> LossAtT:
    """Return L_hybrid with a VLB that counts `weight` times as much. The bug: a weight other than 1."""

    def loss(
        diffusion: GaussianDiffusion, denoiser: Denoiser, x_0: Tensor, t: Tensor, noise: Tensor
    ) -> Float[Tensor, "n"]:
        x_t = diffusion.q_sample(x_0, t, noise)
        output = diffusion.predict(denoiser, x_t, t)
        return squared_error(output, noise) + weight * vlb_for_variance(diffusion, output, x_0, x_t, t)

    return loss


def leaking_hybrid(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n"]:
    """Return L_hybrid, for each sample. The bug: the VLB's gradient also reaches eps_hat."""
    x_t = diffusion.q_sample(x_0, t, noise)
    output = diffusion.predict(denoiser, x_t, t)
    bits = vb_terms_bpd(diffusion, output, x_0, x_t, t)
    return squared_error(output, noise) + diffusion.num_timesteps / 1000 * bits


def swapped_range(
    diffusion: GaussianDiffusion,
    output: Float[Tensor, "n out_c h w"],
    x_t: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
) -> Float[Tensor, "n c h w"]:
    """Return the learned log variance. The bug: v = 1 means the small variance instead of the large one."""
    c = x_t.shape[1]
    return learned_range(diffusion, torch.cat([output[:, :c], -output[:, c:]], 1), x_t, t)


def unmapped(process: GaussianDiffusion, denoiser: Denoiser) -> Denoiser:
    """Return a denoiser for a respaced process. The bug: it is given the index in place of the timestep."""
    index = {timestep: i for i, timestep in enumerate(process.timesteps.tolist())}
    return lambda x_t, t: denoiser(x_t, torch.tensor([index[i] for i in t.tolist()], device=x_t.device))
