"""What checks the reader's functions of ddpm.ipynb, here 1.1 to 1.3 and the empty file, 1.12.

training_checks.py has 1.4 and 1.5, sampling_checks.py has those from 1.6 on.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, judge, numbered
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
from lesson_01_ddpm.training_checks import loss_fn, update_average
from lesson_01_ddpm.unet import ResBlock, UNetConfig

__all__ = [
    "best_x_0",
    "empty_file",
    "ideal_denoiser",
    "loss_fn",
    "posterior_mean",
    "q_sample",
    "residual_block",
    "reverse_step",
    "sample",
    "update_average",
    "x_0_from_noise",
]


@numbered("1.1")
def q_sample(answer: Callable) -> None:
    """Walk one pixel through the chain step by step ten thousand times; compare mean and spread."""
    x_0, noise = images(), white_noise()
    with explaining(
        "must match the size",
        "The shapes do not fit: table[t] has one number per image. per_image(table, t) has the "
        "shape [N, 1, 1, 1], which broadcasts over the pixels.",
    ):
        x_t = answer(x_0, TIMESTEPS, noise)
    expect_shape(x_t, (4, 1, 8, 8))
    if not torch.equal(x_t, answer(x_0, TIMESTEPS, noise)):
        raise WrongAnswer("Two calls differ: use the argument `noise`, and draw none of your own.")
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
        if allclose(x_t[1:], DIFFUSION.q_sample(x_0, (TIMESTEPS - 1).clamp(min=0), noise)[1:]):
            raise WrongAnswer("That is the image one step earlier: t is an index that starts at 0.")
        raise WrongAnswer(f"At t = {TIMESTEPS[off.argmax()]} the result is off by up to {off.max():.3f}.")


@numbered("1.2, one image")
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
    if allclose(back, x_t - at((1 / alpha_bar - 1).sqrt()) * noise):
        raise WrongAnswer("Only the noise is divided by sqrt(alpha_bar). Set brackets: x_t is divided, too.")
    noise_factor = (1 - alpha_bar).sqrt()
    for a, b in ((alpha_bar, 1 - alpha_bar), (alpha_bar.sqrt(), 1 - alpha_bar), (alpha_bar, noise_factor)):
        if allclose(back, (x_t - at(b) * noise) / at(a)):
            raise WrongAnswer("A root is missing: eq. 4 has sqrt(alpha_bar) and sqrt(1 - alpha_bar).")
    if not torch.allclose(back, x_0, atol=1e-2):
        raise WrongAnswer(
            f"At t = 500 the first pixel of x_0 is {x_0[2, 0, 0, 0]:.3f}, and you get {back[2, 0, 0, 0]:.3f}."
        )


@numbered("1.2, the average")
def best_x_0(answer: Callable) -> None:
    """Compare with Bayes' rule for the two possible values, written with their log densities."""
    t, x_t = torch.tensor([300, 0, 300, 999]), torch.tensor([0.1, 0.1, -1.5, 0.8]).view(-1, 1, 1, 1)
    a = DIFFUSION.alpha_bar[t].view(-1, 1, 1, 1)
    log_p = [Normal(a.sqrt() * value, (1 - a).sqrt()).log_prob(x_t.double()) for value in (1, -1)]
    p = torch.stack(log_p).softmax(0)[0]
    result = answer(x_t, t)
    if isinstance(result, Tensor) and torch.allclose(result, (p / (1 - p)).float(), rtol=1e-3):
        raise WrongAnswer("That is the ratio p / (1 - p). The average is p - (1 - p).")
    if isinstance(result, Tensor) and not result.isfinite().all():
        raise WrongAnswer("At t = 0 the result is NaN, because an exponential overflows. tanh does not.")
    expect_shape(result, (4, 1, 1, 1))
    if allclose(result, p):
        raise WrongAnswer("That is the probability p of the value 1. The average is p - (1 - p).")
    if allclose(result, x_t.sign()):
        raise WrongAnswer("That is the more probable of the two values. The average lies between them.")
    if allclose(result, 1 - 2 * p):
        raise WrongAnswer("The sign is wrong: the larger x_t is, the more probable is the value 1.")
    if allclose(result, (x_t / (1 - a)).tanh()):
        raise WrongAnswer("In x_t the two values are fainter: they are -sqrt(alpha_bar) and sqrt(alpha_bar).")
    if allclose(result, (a.sqrt() * x_t / (1 - a).sqrt()).tanh()):
        raise WrongAnswer("The exponent of a Gaussian divides by the variance, which is 1 - alpha_bar.")
    if any(allclose(result, (factor * a.sqrt() * x_t / (1 - a)).tanh()) for factor in (0.5, 2)):
        raise WrongAnswer("The exponent is off by a factor of 2: tanh u is (e^u - e^-u) / (e^u + e^-u).")
    if allclose(result, x_t / a.sqrt()) or allclose(result, (x_t / a.sqrt()).clamp(-1, 1)):
        raise WrongAnswer("x_t / sqrt(alpha_bar) does not use that the pixel can only be -1 or 1.")
    if not allclose(result, 2 * p - 1):
        raise WrongAnswer(
            f"For x_t = 0.1 at t = 300 the average is {2 * p[0].item() - 1:.3f}, and you get "
            f"{result[0].item():.3f}."
        )


@numbered("1.3")
def residual_block(answer: Callable) -> None:
    """Compare with the reference, with weights that are not zero."""
    torch.manual_seed(0)
    block = ResBlock(4, 8, UNetConfig(num_channels=4, num_groups=2))
    nn.init.normal_(block.conv_2.weight, std=0.1)
    x, emb = torch.randn(2, 4, 8, 8), torch.randn(2, 16)
    with torch.no_grad():
        h = block.conv_1(nn.functional.silu(block.norm_1(x)))
        h = h + block.emb(nn.functional.silu(emb))[:, :, None, None]
        expected = block.skip(x) + block.conv_2(nn.functional.silu(block.norm_2(h)))
        first = block.conv_1(nn.functional.silu(block.norm_1(x)))
        without_silu = first + block.emb(emb)[:, :, None, None]
        at_the_end = block.skip(x) + block.conv_2(nn.functional.silu(block.norm_2(first))) + h - first
        silu, shift = nn.functional.silu, block.emb(nn.functional.silu(emb))[:, :, None, None]
        late = [silu(block.norm_2(first) + shift), silu(block.norm_2(first)) + shift]
        with (
            explaining(
                "must match the size",
                "Two shapes do not fit. block.emb(...) is [N, C_out]: it needs [:, :, None, None], and "
                "it is added after conv_1. The input has to pass through block.skip.",
            ),
            explaining(
                "size equal to the number of channels",
                "The order is norm, SiLU, convolution, twice: norm_1 comes before conv_1.",
            ),
            explaining("[8, 4, 1, 1]", "block.skip takes the block's input x, which has C_in channels."),
        ):
            ours = answer(block, x, emb)
        expect_shape(ours, (2, 8, 8, 8))
        if allclose(ours, expected - block.skip(x)):
            raise WrongAnswer("The input is missing: add block.skip(x) at the end.")
        if allclose(ours, answer(block, x, torch.zeros_like(emb))):
            raise WrongAnswer("The result does not depend on emb: add block.emb(...) to every position.")
        if allclose(ours, block.skip(x) + block.conv_2(nn.functional.silu(block.norm_2(without_silu)))):
            raise WrongAnswer("emb has no activation: project F.silu(emb).")
        if allclose(ours, at_the_end):
            raise WrongAnswer("emb is added at the end, and only shifts channels there. Add it after conv_1.")
        if any(allclose(ours, block.skip(x) + block.conv_2(h)) for h in late):
            raise WrongAnswer("emb is added after norm_2. Add it right after conv_1, before norm_2.")
        if not allclose(ours, expected):
            off = (ours - expected).abs().max().item()
            raise WrongAnswer(
                f"The result is off by up to {off:.2f}. The order is norm, SiLU, convolution, twice."
            )


def chain(answer: Callable) -> None:
    """Sample with the ideal denoiser of one image: x_t must be distributed as in the forward process."""
    image, x = images(1), white_noise(400)

    def knows_x_0(x_t: Tensor, t: Tensor) -> Tensor:
        return DIFFUSION.noise_from_x_0(x_t, t, image.expand_as(x_t))

    torch.manual_seed(0)
    with torch.no_grad():
        for t in range(999, 299, -1):
            x = answer(knows_x_0, x, t)
    factor = (x * image).sum().item() / (400 * image.square().sum().item())
    noise, alpha_bar = (x - factor * image).std().item(), DIFFUSION.alpha_bar[299].item()
    for bug, numbers in {"alpha_t": (0.46, 0.60), "alpha_bar_prev": (0.29, 0.79)}.items():
        if abs(factor - numbers[0]) + abs(noise - numbers[1]) < 0.04:
            raise WrongAnswer(f"In the posterior mean, {bug} stands where its root belongs.")
    if abs(factor - alpha_bar**0.5) + abs(noise - (1 - alpha_bar) ** 0.5) > 0.04:
        raise WrongAnswer(
            f"With the ideal denoiser of one image, after the step at t = 300 the image has the factor "
            f"{factor:.2f} and the noise {noise:.2f}; in the forward process they are "
            f"{alpha_bar**0.5:.2f} and {(1 - alpha_bar) ** 0.5:.2f}."
        )


def empty_file(loss: Callable, step: Callable) -> None:
    """Print what is wrong with a loss and a reverse step that were written without looking."""
    print(f"The loss: {judge(loss, loss_fn)}")
    verdict = judge(step, reverse_step)
    print(f"The reverse step: {judge(step, chain) if verdict == 'correct.' else verdict}")
