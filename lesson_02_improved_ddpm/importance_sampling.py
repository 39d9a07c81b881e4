"""Importance sampling of t: train often where the loss is large (Nichol & Dhariwal 2021, section 3.3)."""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from common.protocols import LossAtT
from lesson_01_ddpm.diffusion import GaussianDiffusion


class ImportanceSampledLoss(nn.Module):
    """A loss at t drawn with p_t ~ sqrt(E[L_t^2]), weighted by 1 / (T p_t) so that its mean stays the same.

    loss: (diffusion, denoiser, x_0, t, noise) -> [N]. E[L_t^2] is estimated from the last `history` losses at
    each t. Until every t has that many, and whenever gradients are off (validation), t is uniform; afterwards
    one draw in a thousand is, so that no t is forgotten. The history is a buffer and is saved with the run.
    """

    losses: Tensor  # float64 [T, history]
    counts: Tensor  # int64 [T], how many losses each t has had

    def __init__(self, loss: LossAtT, diffusion: GaussianDiffusion, history: int = 10):
        super().__init__()
        self.loss, self.diffusion = loss, diffusion
        self.register_buffer("losses", torch.zeros(diffusion.num_timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(diffusion.num_timesteps, dtype=torch.int64))

    def probabilities(self) -> Float[Tensor, "T"]:
        """Return p_t in float64."""
        num_timesteps, history = self.losses.shape
        uniform = torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)
        if self.counts.min() < history:
            return uniform
        weights = self.losses.square().mean(1).sqrt()
        return 0.999 * weights / weights.sum() + 0.001 * uniform

    def forward(
        self, denoiser: Any, x_0: Float[Tensor, "n c *size"], label: Tensor | None = None
    ) -> Float[Tensor, "n"]:
        training = torch.is_grad_enabled()
        p = self.probabilities() if training else torch.ones_like(self.losses[:, 0]) / len(self.losses)
        t = torch.multinomial(p, len(x_0), replacement=True)
        losses = self.loss(self.diffusion, denoiser, x_0, t, torch.randn_like(x_0))
        if training:
            self.update_history(t, losses.detach().cpu().double())
        weights = 1 / (len(p) * p[t])
        return weights.float().to(losses.device) * losses

    def update_history(self, t: Int[Tensor, "n"], losses: Float[Tensor, "n"]) -> None:
        """Replace the oldest loss at each of these timesteps."""
        for i, loss in zip(t.tolist(), losses):
            self.losses[i, self.counts[i] % self.losses.shape[1]] = loss
            self.counts[i] += 1
