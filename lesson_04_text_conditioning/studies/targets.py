"""Predicted noise against predicted velocity, for the experiments `targets` and `x_0_error`."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.digits.captions import CAPTIONS, NUM_PHRASINGS, CaptionedDigits
from common.digits.mnist import load_digits
from common.protocols import Loss, TextToImageNetwork
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_04_text_conditioning.model import LR_SCALES, UNET_CONFIG
from lesson_04_text_conditioning.studies.captioned_digits import Study, train_captioned, untrained_network
from lesson_04_text_conditioning.studies.text_ablations import conditional_denoiser, loss_with_text
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.velocity import loss_hybrid_velocity

# for a network of which `VelocityPrediction` is no part
NOISE_LR_SCALES = {name.removeprefix("network."): scale for name, scale in LR_SCALES.items()}
TIMESTEPS = (100, 300, 500, 700, 800, 900, 950, 970, 980, 990, 995)
COLUMN_TITLES = {"target": "network predicts", "start": "first timestep", "predicted_by": "x_0 from"}
NUM_TEST = 256  # test images on which errors are measured

# (x_t [N, 3, 32, 32], t [N], indices into CAPTIONS [N]) -> x_0_hat
PredictX0: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def predicts_noise(study: Study) -> Any:
    """Return the network of lesson 4 without `VelocityPrediction`, with weights drawn by the study's seed."""
    torch.manual_seed(study.config.seed)
    return TextUNet(UNET_CONFIG, TextConfig(study.tokenizer.vocab_size, study.tokenizer.context_length))


def noise_variant(study: Study) -> tuple[Any, Loss, dict[str, float]]:
    """Return network, loss and learning-rate multipliers of a network that predicts the noise."""
    return predicts_noise(study), loss_with_text(loss_hybrid), NOISE_LR_SCALES


def target_networks(study: Study) -> dict[str, Any]:
    """Return lesson 4's network trained to predict the noise, and trained to predict the velocity."""
    train = partial(train_captioned, study, group="targets")
    network, loss, lr_scales = noise_variant(study)
    return {
        "noise": train("noise", network, loss, lr_scales=lr_scales),
        "velocity": train("velocity", untrained_network(study), loss_with_text(loss_hybrid_velocity)),
    }


def process_from(start: int, num_steps: int) -> GaussianDiffusion:
    """Return the process restricted to `num_steps` evenly spaced timesteps from 0 to `start`."""
    return make_diffusion().respace(torch.linspace(0, start, num_steps, dtype=torch.float64).round().long())


def predictions_of_x_0(networks: Mapping[str, TextToImageNetwork], study: Study) -> dict[str, PredictX0]:
    """Return the ways to predict x_0: each network, the mean image, and the mean image of a caption."""
    diffusion = make_diffusion()

    def by_network(network: TextToImageNetwork, x_t: Tensor, t: Tensor, caption: Tensor) -> Tensor:
        denoiser = conditional_denoiser(network, study.tokenizer, [CAPTIONS[i] for i in caption.tolist()])
        device = next(network.parameters()).device
        eps_hat = denoiser(x_t.to(device), t.to(device))[:, :3].cpu()
        return diffusion.x_0_from_noise(x_t, t, eps_hat)

    torch.manual_seed(0)
    images, captions = CaptionedDigits(study.splits[0]).batch(torch.arange(len(study.splits[0])))
    contents = captions // NUM_PHRASINGS  # what a caption says, whatever its words
    sums = torch.zeros(len(CAPTIONS) // NUM_PHRASINGS, *images.shape[1:]).index_add(0, contents, images)
    means = sums / contents.bincount(minlength=len(sums)).clamp(min=1).view(-1, 1, 1, 1)
    return {
        **{f"predicted {name}": partial(by_network, network) for name, network in networks.items()},
        "mean image": lambda x_t, t, caption: images.mean(0).expand_as(x_t),
        "mean image of the caption": lambda x_t, t, caption: means[caption // NUM_PHRASINGS],
    }


@torch.no_grad()
def measure_x_0_error(predict: PredictX0, study: Study) -> dict[str, Any]:
    """Return the mean squared error of the clipped x_0_hat on captioned test digits at TIMESTEPS."""
    torch.manual_seed(1)
    digits = load_digits(study.config.dataset, study.config.data_dir, train=False)
    x_0, caption = CaptionedDigits(digits).batch(torch.arange(min(NUM_TEST, len(digits))))
    diffusion, errors = make_diffusion(), {}
    for i in TIMESTEPS:
        t: Int[Tensor, "n"] = torch.full((len(x_0),), i)
        noise: Float[Tensor, "n c h w"] = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(i))
        x_0_hat = predict(diffusion.q_sample(x_0, t, noise), t, caption).clamp(-1, 1)
        errors[f"t={i}"] = (x_0_hat - x_0).square().mean().item()
    return {"n": len(x_0)} | errors
