"""What checks the reader's functions of ddpm.ipynb; sampling_checks.py has those from 1.6 on."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, numbered
from lesson_01_ddpm.sampling_checks import (
    DIFFUSION,
    TIMESTEPS,
    at,
    ideal_denoiser,
    images,
    posterior_mean,
    reverse_step,
    sample,
    white_noise,
)
from lesson_01_ddpm.unet import ResBlock, UNetConfig

__all__ = [
    "ideal_denoiser",
    "loss_fn",
    "posterior_mean",
    "q_sample",
    "residual_block",
    "reverse_step",
    "sample",
    "train_step",
    "x_0_from_noise",
]


@numbered("1.1")
def q_sample(answer: Callable) -> None:
    """Walk one pixel through the chain step by step ten thousand times; compare mean and spread."""
    x_0, noise = images(), white_noise()
    x_t = answer(x_0, TIMESTEPS, noise)
    expect_shape(x_t, (4, 1, 8, 8))
    alpha_bar = DIFFUSION.alpha_bar
    if allclose(x_t, at(alpha_bar) * x_0 + at(1 - alpha_bar) * noise):
        raise WrongAnswer("The factors are alpha_bar and 1 - alpha_bar: take their roots.")
    if allclose(x_t, at(alpha_bar) * x_0 + at((1 - alpha_bar).sqrt()) * noise):
        raise WrongAnswer("The image is too faint: its factor is the root of alpha_bar.")
    if allclose(x_t, at(alpha_bar.sqrt()) * x_0 + at(1 - alpha_bar) * noise):
        raise WrongAnswer("The noise is too weak: its variance, not its factor, is 1 - alpha_bar.")
    if allclose(x_t, at((1 - DIFFUSION.betas).sqrt()) * x_0 + at(DIFFUSION.betas.sqrt()) * noise):
        raise WrongAnswer("That is a single step, with beta. To go straight to x_t takes alpha_bar.")
    if allclose(x_t, at((1 - alpha_bar).sqrt()) * x_0 + at(alpha_bar.sqrt()) * noise):
        raise WrongAnswer("Image and noise have each other's factor: at t = 999 nearly everything is noise.")
    pixel = torch.full((10_000,), 0.6, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    for beta in DIFFUSION.betas[:60]:
        fresh = torch.randn(pixel.shape, generator=generator).double()
        pixel = (1 - beta).sqrt() * pixel + beta.sqrt() * fresh
    t = torch.full((1,), 59)
    mean = answer(torch.full((1, 1, 1, 1), 0.6), t, torch.zeros(1, 1, 1, 1)).item()
    std = answer(torch.zeros(1, 1, 1, 1), t, torch.ones(1, 1, 1, 1)).item()
    if abs(mean - pixel.mean()) > 0.01 or abs(std - pixel.std()) > 0.01:
        found = f"after 60 steps a pixel of 0.6 has mean {mean:.3f} and standard deviation {std:.3f}"
        raise WrongAnswer(f"In your formula, {found}; the chain gives {pixel.mean():.3f}, {pixel.std():.3f}.")
    off = (x_t - at(alpha_bar.sqrt()) * x_0 - at((1 - alpha_bar).sqrt()) * noise).abs().amax((1, 2, 3))
    if off.max() > 1e-3:
        raise WrongAnswer(f"At t = {TIMESTEPS[off.argmax()]} the result is off by up to {off.max():.3f}.")


@numbered("1.2")
def x_0_from_noise(answer: Callable) -> None:
    """Noise that was added must come off again."""
    x_0, noise, alpha_bar = images(), white_noise(), DIFFUSION.alpha_bar
    x_t = DIFFUSION.q_sample(x_0, TIMESTEPS, noise)
    back = answer(x_t, TIMESTEPS, noise)
    expect_shape(back, (4, 1, 8, 8))
    if allclose(back, (x_t - at((1 - alpha_bar).sqrt()) * noise) * at(alpha_bar.sqrt())):
        raise WrongAnswer("You multiply by sqrt(alpha_bar). To undo this factor, divide by it.")
    if allclose(back, x_t - at((1 - alpha_bar).sqrt()) * noise):
        raise WrongAnswer("The image is still as faint as in x_t: divide by sqrt(alpha_bar).")
    if allclose(back * at(alpha_bar.sqrt()), x_0):
        raise WrongAnswer("Too large by 1 / sqrt(alpha_bar): you divide once too often.")
    if allclose(back, (x_t + at((1 - alpha_bar).sqrt()) * noise) / at(alpha_bar.sqrt())):
        raise WrongAnswer("The sign is wrong: the noise was added, so subtract it.")
    if allclose(back, x_t / at(alpha_bar.sqrt()) - at((1 - alpha_bar).sqrt()) * noise):
        raise WrongAnswer("Only x_t is divided by sqrt(alpha_bar). The noise has to be divided, too.")
    if not torch.allclose(back, x_0, atol=1e-2):
        raise WrongAnswer(
            f"At t = 500 the first pixel of x_0 is {x_0[2, 0, 0, 0]:.3f}, and you get {back[2, 0, 0, 0]:.3f}."
        )


@numbered("1.3")
def residual_block(answer: Callable) -> None:
    """Compare with the four lines of the text, with weights that are not zero."""
    torch.manual_seed(0)
    block = ResBlock(4, 8, UNetConfig(num_channels=4, num_groups=2))
    nn.init.normal_(block.conv_2.weight, std=0.1)
    x, emb = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
    with torch.no_grad():
        h = block.conv_1(nn.functional.silu(block.norm_1(x)))
        h = h + block.emb(nn.functional.silu(emb))[:, :, None, None]
        expected = block.skip(x) + block.conv_2(nn.functional.silu(block.norm_2(h)))
        without_silu = block.conv_1(nn.functional.silu(block.norm_1(x))) + block.emb(emb)[:, :, None, None]
        try:
            ours = answer(block, x, emb)
        except RuntimeError as error:
            if "must match the size" in str(error):
                raise WrongAnswer(
                    "Two shapes do not fit. block.emb(...) is [N, C] and needs [:, :, None, None] to be "
                    "added to an image, and the input has to pass through block.skip."
                ) from error
            raise
        expect_shape(ours, (2, 8, 8, 8))
        if allclose(ours, expected - block.skip(x)):
            raise WrongAnswer("The skip connection is missing: add block.skip(x) at the end.")
        if allclose(ours, answer(block, x, torch.zeros_like(emb))):
            raise WrongAnswer("The result does not depend on emb: add block.emb(...) to every position.")
        if allclose(ours, block.skip(x) + block.conv_2(nn.functional.silu(block.norm_2(without_silu)))):
            raise WrongAnswer("emb has no activation: project F.silu(emb).")
        if not allclose(ours, expected):
            off = (ours - expected).abs().max().item()
            raise WrongAnswer(
                f"The result is off by up to {off:.2f}. The order is norm, SiLU, convolution, twice."
            )


@numbered("1.4")
def loss_fn(answer: Callable) -> None:
    """Networks whose loss is known: one that predicts zero, and one that knows x_0."""
    torch.manual_seed(0)
    x_0, seen = images(256), []

    def predicts_zero(x_t: Tensor, t: Tensor) -> Tensor:
        seen.append((x_t, t))
        return torch.zeros_like(x_t)

    def knows_the_noise(x_t: Tensor, t: Tensor) -> Tensor:
        return DIFFUSION.noise_from_x_0(x_t, t, x_0)

    loss = answer(predicts_zero, x_0)
    if not isinstance(loss, Tensor) or loss.shape != ():
        raise WrongAnswer("Return a single number: the mean over all images and pixels.")
    if not seen:
        raise WrongAnswer("The network was not called.")
    x_t, t = seen[0]
    if t.shape != (256,) or t.is_floating_point():
        raise WrongAnswer(f"The network needs one integer t per image; it got {tuple(t.shape)} of {t.dtype}.")
    if len(t.unique()) == 1:
        raise WrongAnswer("All images have the same t: draw one for each image.")
    if t.min() < 0 or t.max() > 999 or (t > 900).sum() == 0 or (t < 100).sum() == 0:
        raise WrongAnswer(f"t runs from {t.min()} to {t.max()}; draw it from 0 to 999.")
    if torch.equal(x_t, x_0):
        raise WrongAnswer("The network sees the clean images: add the noise first.")
    if abs(loss.item() - 1) > 0.05:
        raise WrongAnswer(
            f"For a network that predicts zero the loss must be near 1, and is {loss.item():.3f}. "
            "Is the target the noise, and is the noise from randn?"
        )
    if answer(knows_the_noise, x_0).item() > 1e-2:
        raise WrongAnswer("Predicting the noise exactly still has a loss. Compare with the noise in x_t.")
    answer(predicts_zero, torch.zeros(20_000, 1, 1, 1))
    if (seen[-1][1].min(), seen[-1][1].max()) != (0, 999):
        raise WrongAnswer(
            f"In 20,000 draws t runs from {seen[-1][1].min()} to {seen[-1][1].max()}, not from 0 to 999. "
            "The upper end of randint is exclusive."
        )


@numbered("1.5")
def train_step(answer: Callable) -> None:
    """A network with one weight, whose gradient is known."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
            return self.weight * x_t

    torch.manual_seed(0)
    network = Scale()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    first = answer(network, optimizer, images(256))
    after_one = network.weight.item()
    if after_one == 0:
        raise WrongAnswer(
            "The weight has not changed: call backward() on the loss, then optimizer.step(), and zero_grad() "
            "before both or after both."
        )
    answer(network, optimizer, images(256, seed=2))
    if abs(network.weight.item() - after_one) > 1.5 * abs(after_one):
        raise WrongAnswer(
            "The second step is too long: the gradient of the first is still in it. zero_grad()?"
        )
    if not isinstance(first, float):
        raise WrongAnswer("Return the loss as a float (loss.item()), so that no graph is kept alive.")
