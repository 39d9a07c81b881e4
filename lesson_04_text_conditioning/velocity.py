"""Reading a network's output as velocity: better conditioned where the noise is strongest (Salimans & Ho
2022).

Three channels repeat one digit, so a coloured digit stands out of more noise than a gray one: digit and
colour are decided at large t. There eps_hat must copy x_t to the third decimal, for its errors are divided by
sqrt(alpha_bar) on the way to x_0. The velocity is nearly -x_0 there, and an error stays as large as it is.
"""

import torch

from common.data import check_range
from lesson_01_ddpm.diffusion import squared_error
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_04_text_conditioning.text_unet import TextUNet


class VelocityUNet(TextUNet):
    """A TextUNet that predicts velocity = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, and answers with
    eps_hat.

    From outside it is a network like any other: (x_t, t, text) -> [N, 2C, H, W], eps_hat and v.
    alpha_bar: [T], of the process that it is trained on. beside: what TextUNet's constructor takes besides.
    """

    def __init__(self, config, text_config, alpha_bar, **beside):
        super().__init__(config, text_config, **beside)
        self.register_buffer("alpha_bar", alpha_bar.float(), persistent=False)

    def forward(self, x_t, t, text, **seen):
        output, c = super().forward(x_t, t, text, **seen).float(), x_t.shape[1]
        alpha_bar = self.alpha_bar[t].view(-1, 1, 1, 1)
        eps_hat = alpha_bar.sqrt() * output[:, :c] + (1 - alpha_bar).sqrt() * x_t
        return torch.cat([eps_hat, output[:, c:]], 1)


def loss_velocity_simple(diffusion, denoiser, x_0, t, noise):
    """The squared error of the velocity, which is that of eps over alpha_bar: [N]."""
    check_range(x_0)
    eps_hat = diffusion.ask(denoiser, diffusion.q_sample(x_0, t, noise), t)[:, : x_0.shape[1]]
    return squared_error(eps_hat, noise) / diffusion.alpha_bar[t.cpu()].float().to(x_0.device)


def loss_velocity(diffusion, denoiser, x_0, t, noise):
    """L_hybrid with the squared error of the velocity in place of that of eps: [N]."""
    output = diffusion.ask(denoiser, diffusion.q_sample(x_0, t, noise), t)
    more = (1 / diffusion.alpha_bar - 1)[t.cpu()].float().to(x_0.device)
    return loss_hybrid(diffusion, lambda x_t, t: output, x_0, t, noise) + more * squared_error(output, noise)
