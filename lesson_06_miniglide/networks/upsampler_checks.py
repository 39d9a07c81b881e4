"""What checks the reader's functions of upsampling.ipynb."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_01_ddpm.diffusion import GaussianDiffusion, linear_betas


def unmix(x: Tensor, image: Tensor) -> tuple[float, Tensor]:
    """Return the factor of an image of pixels -1 and 1 in x, and what else is in x."""
    factor = (x * image).mean()
    return factor.item(), x - factor * image


@numbered("6.7, upsampler_inputs")
def upsampler_inputs(answer: Callable) -> None:
    """Means with hardly any noise, then factor, strength and independence of the noise."""
    torch.manual_seed(0)
    process, image = GaussianDiffusion(linear_betas(1000)), torch.rand(4, 3, 64, 64) * 2 - 1

    def low_res_of(image: Tensor, level: int) -> Tensor:
        levels = torch.full((4,), level)
        result = answer(process, image, levels)
        if not isinstance(result, dict) or set(result) != {"low_res", "noise_level"}:
            raise WrongAnswer("Return a dict with two entries, low_res and noise_level.")
        expect_shape(result["low_res"], (4, 3, 16, 16))
        if not torch.equal(torch.as_tensor(result["noise_level"]), levels):
            raise WrongAnswer("noise_level must be the level of each image [N], as it is given.")
        return result["low_res"]

    clean = low_res_of(image, 0)
    if (clean - image[:, :, ::4, ::4]).abs().max() < 0.1:
        raise WrongAnswer(
            "One pixel of each 4x4 is kept, and fifteen are lost. Take the mean of all sixteen."
        )
    if (clean - F.avg_pool2d(image, 4)).abs().max() > 0.1:
        raise WrongAnswer("At level 0 each pixel must be nearly the mean of 4x4 pixels.")
    small = torch.randn(4, 3, 16, 16).sign()
    noisy_small = low_res_of(F.interpolate(small, 64), 300)
    (factor, noise), a = unmix(noisy_small, small), process.alpha_bar[300].item()
    std, wanted = noise.std().item(), (1 - a) ** 0.5
    if std < 0.02:
        raise WrongAnswer("The noise is missing.")
    if abs(std - wanted / 4) < 0.03:
        raise WrongAnswer("The mean of 4x4 pixels weakens the noise: make the image smaller first.")
    if abs(factor - 1) < 0.05:
        raise WrongAnswer("The image has its full strength. In x_t its factor is sqrt(alpha_bar).")
    if abs(factor - a**0.5) > 0.05 or abs(std - wanted) > 0.05:
        raise WrongAnswer("Image and noise must have the factors of x_t, at timestep `level`.")
    if torch.equal(noisy_small, low_res_of(F.interpolate(small, 64), 300)):
        raise WrongAnswer("Two calls give the same noise. Draw it again each time.")


@numbered("6.7, upsampler_loss")
def upsampler_loss(answer: Callable) -> None:
    """A network that records its inputs, on images of large square pixels."""
    torch.manual_seed(0)
    n, process = 8, GaussianDiffusion(linear_betas(1000))
    small = torch.randn(n, 3, 16, 16).sign()
    image, v_hat = F.interpolate(small, 64), torch.randn(n, 6, 64, 64)
    t, level, text, calls = torch.full((n,), 150), torch.full((n,), 300), object(), []

    def network(*args: Any, **kwargs: Any) -> Tensor:
        names = ("x_t", "t", "text", "low_res", "noise_level")
        calls.append(dict(zip(names, args)) | kwargs)
        return v_hat

    with explaining("tensor a (6)", "The network returns six channels; the velocity is in the first three."):
        result = answer(network, process, image, text, t, level)
    expect_shape(result, (n,))
    if len(calls) != 1:
        raise WrongAnswer(f"The network was called {len(calls)} times; once is enough.")
    if missing := {"text", "low_res", "noise_level"} - set(calls[0]):
        raise WrongAnswer(f"The network does not get {' and '.join(sorted(missing))}.")
    if calls[0]["text"] is not text:
        raise WrongAnswer("The network must get the text as it is.")
    expect_shape(calls[0]["low_res"], small.shape)
    if not torch.equal(calls[0]["t"], t):
        raise WrongAnswer("The network must get t, the timestep of the large image, as its second input.")
    if not torch.equal(calls[0]["noise_level"], level):
        raise WrongAnswer("The noise_level that the network gets must be the level of its low_res.")
    a_t, a_level = process.alpha_bar[150].item(), process.alpha_bar[300].item()
    factor, low_noise = unmix(calls[0]["low_res"], small)
    if abs(factor - 1) < 0.05:
        raise WrongAnswer("The low-resolution image has no noise. Call upsampler_inputs.")
    if abs(factor - a_level**0.5) > 0.05 or abs(low_noise.std().item() - (1 - a_level) ** 0.5) > 0.05:
        raise WrongAnswer("The low-resolution image must have the noise of `level`, and no other.")
    if abs(unmix(calls[0]["x_t"], image)[0] - a_t**0.5) > 0.05:
        raise WrongAnswer("x_t must be the large image with the noise of timestep t.")
    noise = (calls[0]["x_t"] - a_t**0.5 * image) / (1 - a_t) ** 0.5
    if abs((F.avg_pool2d(noise, 4) * low_noise).mean()) > 0.05:
        raise WrongAnswer("Both images have the same noise. Draw the noise of low_res independently.")
    v = a_t**0.5 * noise - (1 - a_t) ** 0.5 * image
    for name, target in (("noise", noise), ("image", image), ("velocity with the wrong sign", -v)):
        if allclose(result, (v_hat[:, :3] - target).square().mean((1, 2, 3))):
            raise WrongAnswer(f"Your target is the {name}; the network predicts the velocity.")
    if not allclose(result, (v_hat[:, :3] - v).square().mean((1, 2, 3))):
        raise WrongAnswer("The loss must be the mean squared error of the velocity, for each image.")
