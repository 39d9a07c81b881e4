"""Flow matching on straight lines (Lipman et al. 2023; rectified flow: Liu et al. 2023).

A straight line connects an image, at tau = 0, and noise, at tau = 1: x_tau = (1 - tau) x_0 + tau noise. A
network predicts its velocity, noise - x_0. A sample starts at noise and follows the velocity to tau = 0.
"""

from collections.abc import Iterator
from dataclasses import asdict, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.images import check_range
from common.protocols import DenoisedFn, Denoiser, Metadata, Model, SamplerStep
from common.training.config import config_from_dict
from lesson_01_ddpm.diffusion import clamp_x_0, squared_error
from lesson_03_adm.adm_unet import ADMConfig
from lesson_04_text_conditioning.model import UNET_CONFIG, tokenizer_from_metadata
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_04_text_conditioning.velocity import VelocityPrediction
from lesson_05_cfg.pipeline import TextToImagePipeline

T = 1000  # networks see t = 1000 tau - 1, as in the other lessons
FLOW_CONFIG = replace(UNET_CONFIG, out_channels=3)  # lesson 4's network, without the learned variance


def nearest_timestep(tau: Float[Tensor, "*n"]) -> Int[Tensor, "*n"]:
    """Return the timestep, 0 to 999, that networks are given at a time between 0 and 1."""
    return (T * tau - 1).round().clamp(min=0).long()


class RectifiedFlow:
    """The process x_tau = (1 - tau) x_0 + tau noise at tau = (t + 1) / 1000, for given timesteps t [S]."""

    def __init__(self, timesteps: Int[Tensor, "S"]):
        self.timesteps, self.num_timesteps = timesteps, len(timesteps)
        self.tau = (timesteps + 1) / T

    def respace_evenly(self, num_steps: int) -> "RectifiedFlow":
        """Return the flow at num_steps times, even in tau. Raises ValueError if there are fewer."""
        if not 1 <= num_steps <= self.num_timesteps:
            raise ValueError(f"cannot take {num_steps} of {self.num_timesteps} timesteps")
        return RectifiedFlow(self.timesteps[torch.linspace(-1, T - 1, num_steps + 1).round().long()[1:]])

    def predict(
        self, denoiser: Denoiser, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]
    ) -> Float[Tensor, "n c h w"]:
        """Return the predicted velocity at index t of this process."""
        return denoiser(x_t, self.timesteps[t.cpu()].to(x_t.device)).float()


def loss_flow(
    flow: RectifiedFlow,
    denoiser: Denoiser,
    x_0: Float[Tensor, "n c h w"],
    t: Int[Tensor, "n"],
    noise: Float[Tensor, "n c h w"],
) -> Float[Tensor, "n"]:
    """Return the squared error of the predicted velocity for each sample (Liu et al. 2023, eq. 1)."""
    check_range(x_0)
    tau = flow.tau[t.cpu()].to(x_0.device).view(-1, 1, 1, 1)
    velocity = flow.predict(denoiser, (1 - tau) * x_0 + tau * noise, t)
    return squared_error(velocity, noise - x_0)


@torch.no_grad()
def euler_sample(
    flow: RectifiedFlow,
    denoiser: Denoiser,
    x_T: Float[Tensor, "n c h w"],
    generator: torch.Generator | None = None,
    denoised_fn: DenoisedFn | None = clamp_x_0,
) -> Iterator[SamplerStep]:
    """Follow the predicted velocity from noise to images in Euler steps; yield one step per time.

    Each step ends on the line through x_tau and the predicted x_0, at x_0 + (tau' / tau) (x_tau - x_0).
    (`generator` is not used; samplers share one signature.)
    """
    x_tau, times = x_T, [0.0, *flow.tau.tolist()]
    for i in reversed(range(flow.num_timesteps)):
        tau, tau_next = times[i + 1], times[i]
        x_0 = x_tau - tau * flow.predict(denoiser, x_tau, torch.full((len(x_tau),), i))
        x_0 = denoised_fn(x_0) if denoised_fn else x_0
        x_next = x_0 + tau_next / tau * (x_tau - x_0)
        yield SamplerStep(i, x_tau, x_0, x_next)
        x_tau = x_next


class FlowAsDiffusion(VelocityPrediction):
    """Wrap a network that predicts a flow's velocity, so that it returns eps_hat like any other denoiser.

    Divided by sqrt(alpha_bar) + sqrt(1 - alpha_bar), an x_t of a diffusion process lies on the flow's line,
    at tau = sqrt(1 - alpha_bar) / (sqrt(alpha_bar) + sqrt(1 - alpha_bar)), here rounded to 1/1000.
    network: (x_tau, t, ...) -> velocity. alpha_bar: [T], of that process.
    """

    def forward(
        self, x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"], *args: Any, **conditioning: Any
    ) -> Float[Tensor, "n c h w"]:
        alpha, sigma = self.alpha_bar[t].sqrt(), (1 - self.alpha_bar[t]).sqrt()
        tau = sigma / (alpha + sigma)
        x_tau = x_t / (alpha + sigma).view(-1, 1, 1, 1)
        velocity = self.network(x_tau, nearest_timestep(tau), *args, **conditioning).float()
        return x_tau + (1 - tau).view(-1, 1, 1, 1) * velocity


def build_model(tokenizer: CaptionTokenizer, config: ADMConfig = FLOW_CONFIG) -> Model:
    """Return an untrained network for this tokenizer, its process, and metadata to build them again."""
    text_config = TextConfig(tokenizer.vocab_size, tokenizer.context_length)
    metadata = {"network": asdict(config), "text": asdict(text_config), "tokenizer": tokenizer.to_json()}
    return Model(TextUNet(config, text_config), RectifiedFlow(torch.arange(T)), metadata)


class FlowPipeline(TextToImagePipeline):
    """Captions to digits by flow matching; samplers: `euler_sample`."""

    lesson = "lesson_06_miniglide"

    @staticmethod
    def build_from_metadata(metadata: Metadata) -> Model:
        """Return the untrained model of a checkpoint."""
        return build_model(
            tokenizer_from_metadata(metadata), config_from_dict(ADMConfig, metadata["network"])
        )
