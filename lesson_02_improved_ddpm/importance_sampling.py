"""Which t to train on: often those whose loss is large (Nichol & Dhariwal 2021, section 3.3)."""

import torch
from torch import nn


class ImportanceSampled(nn.Module):
    """A loss over t drawn with p_t ~ sqrt(E[L_t^2]) and weighted by 1 / (T p_t), so that its mean stays L.

    loss: (diffusion, denoiser, x_0, t, noise) -> [N]. The second moments are those of the last `history`

    losses at each t; t is uniform until every t has so many, and whenever no gradient is wanted (validation).
    One in a thousand draws is uniform always, lest a t be forgotten. The history is saved with a training
    run: it is a buffer.
    """

    def __init__(self, loss, diffusion, history=10):
        super().__init__()
        self.loss, self.diffusion = loss, diffusion
        self.register_buffer("losses", torch.zeros(diffusion.num_timesteps, history, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(diffusion.num_timesteps, dtype=torch.int64))

    def probabilities(self):
        """p_t, float64 [T]."""
        num_timesteps, history = self.losses.shape
        uniform = torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)
        if self.counts.min() < history:
            return uniform
        weights = self.losses.square().mean(1).sqrt()
        return 0.999 * weights / weights.sum() + 0.001 * uniform

    def forward(self, denoiser, x_0, label=None):
        training = torch.is_grad_enabled()
        p = self.probabilities() if training else torch.ones_like(self.losses[:, 0]) / len(self.losses)
        t = torch.multinomial(p, len(x_0), replacement=True)
        losses = self.loss(self.diffusion, denoiser, x_0, t, torch.randn_like(x_0))
        if training:
            self.remember(t, losses.detach().cpu().double())
        weights = 1 / (len(p) * p[t])
        return weights.float().to(losses.device) * losses

    def remember(self, t, losses):
        for i, loss in zip(t.tolist(), losses):
            self.losses[i, self.counts[i] % self.losses.shape[1]] = loss
            self.counts[i] += 1
