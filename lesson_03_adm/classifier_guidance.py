"""Classifier guidance (Dhariwal & Nichol 2021, section 4).

Bayes' rule says p(x_t | y) ~ p(x_t) p(y | x_t). The score, the gradient of the log density, of images of
class y is therefore

    grad log p(x_t | y) = grad log p(x_t) + grad log p(y | x_t)

and the second term is the gradient of a classifier of noisy images.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.protocols import DenoisedFn, Denoiser
from lesson_01_ddpm.diffusion import GaussianDiffusion, MeanFn, PMeanVariance, clamp_x_0

GradientFn = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> gradient [N, C, H, W]


def classifier_gradient(
    classifier: Callable[[Tensor, Tensor], Tensor], y: Int[Tensor, "n"], scale: float = 1.0
) -> GradientFn:
    """Return a function for scale * grad log p(y | x_t) with respect to x_t.

    classifier: (x_t, t) -> logits [N, K]. y: the desired classes. scale: above 1 the samples are classified
    with more confidence and are less diverse.
    """

    def gradient(x_t: Float[Tensor, "n ..."], t: Int[Tensor, "n"]) -> Float[Tensor, "n ..."]:
        with torch.enable_grad():
            x_t = x_t.detach().requires_grad_(True)
            log_p = classifier(x_t, t).float().log_softmax(1)
            return scale * torch.autograd.grad(log_p.gather(1, y[:, None]).sum(), x_t)[0]

    return gradient


def condition_mean(gradient: GradientFn) -> MeanFn:
    """Return a `mean_fn` for `ddpm_sample` that shifts the mean by variance * gradient (algorithm 1)."""

    def mean_fn(diffusion: GaussianDiffusion, p: PMeanVariance, x_t: Tensor, t: Tensor) -> Tensor:
        return p.mean + p.log_variance.exp() * diffusion.predict(gradient, x_t, t)

    return mean_fn


def condition_score(
    diffusion: GaussianDiffusion,
    denoiser: Denoiser,
    gradient: GradientFn,
    denoised_fn: DenoisedFn | None = clamp_x_0,
) -> Denoiser:
    """Return a denoiser for eps_hat - sqrt(1 - alpha_bar) gradient (algorithm 2), for `ddim_sample`.

    diffusion: the process with all its timesteps. `denoised_fn` is applied to the predicted x_0 before the
    gradient is added and not after, so sample with denoised_fn=None.
    """

    def guided(x_t: Float[Tensor, "n c h w"], t: Int[Tensor, "n"]) -> Float[Tensor, "n c h w"]:
        x_0 = diffusion.x_0_from_noise(x_t, t, denoiser(x_t, t)[:, : x_t.shape[1]].float())
        eps_hat = diffusion.noise_from_x_0(x_t, t, denoised_fn(x_0) if denoised_fn else x_0)
        noise_scale = (1 - diffusion.alpha_bar).sqrt()
        return eps_hat - diffusion.extract(noise_scale, t, x_t) * gradient(x_t, t)

    return guided
