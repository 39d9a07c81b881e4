"""Velocity prediction: a target that is well conditioned at every noise level (Salimans & Ho 2022).

To recover x_0 from eps_hat, its error is divided by sqrt(alpha_bar), which is nearly 0 at large t. We think
that coloured digits suffer from this more than gray ones: their three channels show the same shape, so digit
and colour are visible, and decided, at larger t. The velocity is nearly -x_0 at large t, and its error is not
amplified.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.images import check_range
from common.protocols import Denoiser
from lesson_01_ddpm.diffusion import GaussianDiffusion, squared_error
from lesson_02_improved_ddpm.variational_bound import vlb_for_variance


class VelocityPrediction(nn.Module):
    """Wrap a network that predicts velocity, so that it returns eps_hat like any other denoiser.

    velocity = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0. network: (x_t, t, ...) -> [N, C or 2C, H, W],
    with the velocity in its first C channels; further channels pass through.
    alpha_bar: [T], of the process that the network is trained on.
    """

    alpha_bar: Tensor

    def __init__(self, network: nn.Module, alpha_bar: Float[Tensor, "T"]):
        super().__init__()
        self.network = network
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)

    def forward(
        self, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"], *args: Any, **conditioning: Any
    ) -> Float[Tensor, "n out_c h w"]:
        output, c = self.network(x_t, t, *args, **conditioning).float(), x_t.shape[1]
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        eps_hat = alpha_bar.sqrt() * output[:, :c] + (1 - alpha_bar).sqrt() * x_t
        return torch.cat([eps_hat, output[:, c:]], 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.network.image_shape  # type: ignore[return-value]

    def encode_text(self, tokens: Tensor, mask: Tensor) -> Any:
        """Encode captions by the wrapped network."""
        return self.network.encode_text(tokens, mask)  # type: ignore[operator]


def velocity_error(
    diffusion: GaussianDiffusion,
    output: Float[Tensor, "n out_c h w"],
    noise: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
) -> Float[Tensor, "n"]:
    """Return the squared error of the velocity for each sample: that of eps_hat divided by alpha_bar."""
    return squared_error(output, noise) / diffusion.alpha_bar[t.cpu()].float().to(noise.device)


def loss_simple_velocity(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n"]:
    """Return L_simple with the velocity as the target, for each sample."""
    check_range(x_0)
    output = diffusion.predict(denoiser, diffusion.q_sample(x_0, t, noise), t)
    return velocity_error(diffusion, output, noise, t)


def loss_hybrid_velocity(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n"]:
    """Return L_hybrid with the velocity as the target of its first half, for each sample."""
    check_range(x_0)
    x_t = diffusion.q_sample(x_0, t, noise)
    output = diffusion.predict(denoiser, x_t, t)
    return velocity_error(diffusion, output, noise, t) + vlb_for_variance(diffusion, output, x_0, x_t, t)
