"""What checks the reader's functions of upsampling.ipynb, editing.ipynb and clip_guidance.ipynb."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, numbered


def noisy(image: Tensor, alpha_bar: float, noise: Tensor) -> Tensor:
    return alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * noise


@numbered("6.7")
def low_res_input(answer: Callable) -> None:
    """Means taken by hand, with little noise and with much."""
    torch.manual_seed(0)
    image, noise = torch.rand(2, 3, 64, 64) * 2 - 1, torch.randn(2, 3, 16, 16)
    small = image.unflatten(3, (16, 4)).unflatten(2, (16, 4)).mean((3, 5))
    clean = answer(image, 1.0, noise)
    expect_shape(clean, (2, 3, 16, 16))
    if allclose(clean, image[:, :, ::4, ::4]):
        raise WrongAnswer(
            "One pixel of each 4x4 is kept, and fifteen are lost. Take the mean of all sixteen."
        )
    if allclose(clean, noise):
        raise WrongAnswer("With alpha_bar = 1 only the noise is left. Exchange the two factors.")
    if not allclose(clean, small):
        raise WrongAnswer("Without noise (alpha_bar = 1) each pixel must be the mean of 4x4 pixels.")
    result = answer(image, 0.3, noise)
    if allclose(result, small):
        raise WrongAnswer("The noise is missing.")
    if allclose(result, small + 0.7**0.5 * noise):
        raise WrongAnswer("The image has its full strength. In x_t its factor is sqrt(alpha_bar).")
    if allclose(result, 0.3 * small + 0.7 * noise):
        raise WrongAnswer("The factors are the square roots of alpha_bar and 1 - alpha_bar.")
    if not allclose(result, noisy(small, 0.3, noise)):
        raise WrongAnswer("Image and noise must have the factors of x_t, at this alpha_bar.")


@numbered("6.10")
def put_known(answer: Callable) -> None:
    """Half of an image is known; its noise must be that of the other half."""
    torch.manual_seed(0)
    sampled, image, noise = torch.randn(3, 2, 3, 8, 8)
    keep = torch.zeros(2, 1, 8, 8)
    keep[..., :4] = 1
    result = answer(sampled, image, keep, 0.4, noise)
    expect_shape(result, (2, 3, 8, 8))
    left, right = result[..., :4], result[..., 4:]
    wanted = noisy(image, 0.4, noise)
    if allclose(right, wanted[..., 4:]) and allclose(left, sampled[..., :4]):
        raise WrongAnswer("The two regions are exchanged: keep is 1 where the image is known.")
    if not allclose(right, sampled[..., 4:]):
        raise WrongAnswer("Where nothing is known, the result must be what was sampled.")
    if allclose(left, image[..., :4]):
        raise WrongAnswer("The known pixels have no noise. The network expects an image of one noise level.")
    if allclose(left, (image + 0.6**0.5 * noise)[..., :4]):
        raise WrongAnswer("The known image has its full strength. In x_t its factor is sqrt(alpha_bar).")
    if allclose(left, (0.4 * image + 0.6 * noise)[..., :4]):
        raise WrongAnswer("The factors are the square roots of alpha_bar and 1 - alpha_bar.")
    if not allclose(left, wanted[..., :4]):
        raise WrongAnswer("The known pixels need the factors of x_t, at this alpha_bar.")


@numbered("6.11")
def repaint_step(answer: Callable) -> None:
    """Numbers in place of images: which functions are called, in which order, on what."""
    calls: list[str] = []

    def traced(name: str, change: float) -> Callable:
        def function(x: Tensor) -> Tensor:
            calls.append(name)
            return 2 * x + change

        return function

    reverse, known, forward = traced("reverse", 1), traced("known", 10), traced("forward", 100)

    def run(repeats: int) -> tuple[Tensor, list[str]]:
        calls.clear()
        result = answer(reverse, known, forward, torch.tensor([3.0]), repeats)
        expect_shape(result, (1,))
        return result, list(calls)

    result, order = run(1)
    if order == ["reverse", "known", "forward"]:
        raise WrongAnswer("The last repetition must end at x_{t-1}: no forward step after it.")
    if order != ["reverse", "known"]:
        raise WrongAnswer(
            f"One repetition called {', '.join(order) or 'nothing'}; it is a reverse step, then put_known."
        )
    result, order = run(3)
    wanted = ["reverse", "known", "forward"] * 2 + ["reverse", "known"]
    if order != wanted:
        raise WrongAnswer(f"Three repetitions called {', '.join(order)}; wanted is {', '.join(wanted)}.")
    x = torch.tensor([3.0])
    for name in wanted:
        x = {"reverse": reverse, "known": known, "forward": forward}[name](x)
    if not allclose(result, x):
        raise WrongAnswer("Each repetition must start from the result of the forward step before it.")


@numbered("6.12")
def sdedit_start(answer: Callable) -> None:
    """A quarter, a half, all of 100 steps."""
    torch.manual_seed(0)
    alpha_bar, (image, noise) = torch.linspace(0.99, 0.01, 100), torch.randn(2, 2, 3, 8, 8)
    for strength in (0.25, 0.5, 1.0):
        t, x_t = answer(image, strength, alpha_bar, noise)
        wanted = round(strength * 100) - 1
        if strength == 0.25 and t == 74:
            raise WrongAnswer("A strength of 0.25 means little noise: a quarter of the steps, not three.")
        if t == wanted + 1:
            raise WrongAnswer(f"After {wanted + 1} steps of noise the index is {wanted}: it counts from 0.")
        if t != wanted:
            raise WrongAnswer(f"For strength {strength} and 100 steps t must be {wanted}; yours is {t}.")
        if allclose(x_t, noise):
            raise WrongAnswer("x_t is noise alone; the image must be in it.")
        if not allclose(x_t, noisy(image, alpha_bar[t].item(), noise)):
            raise WrongAnswer("x_t must be the image with the noise of timestep t, by eq. 4 of lesson 1.")


@numbered("6.15")
def clip_loss(answer: Callable) -> None:
    """Compare with the definition, on vectors of any length."""
    torch.manual_seed(0)
    images, captions = torch.randn(2, 6, 16)
    captions = captions + images

    def loss(logits: Tensor, dims: tuple[int, ...] = (0, 1)) -> Tensor:
        log_p = [logits.log_softmax(dim).diagonal().mean() for dim in dims]
        return -sum(log_p) / len(dims)  # type: ignore[return-value]

    cosines = F.cosine_similarity(images[:, None], captions[None], dim=2)
    result = answer(images, captions, 8.0)
    expect_shape(result, ())
    if allclose(result, loss(8 * images @ captions.T)):
        raise WrongAnswer("Long vectors count more. Normalize every vector to length 1 first.")
    if any(allclose(result, loss(8 * cosines, (dim,))) for dim in (0, 1)):
        raise WrongAnswer("Only one direction. Ask for each image's caption and for each caption's image.")
    if allclose(result, loss(cosines / 8)) or allclose(result, loss(cosines)):
        raise WrongAnswer("The logits are the cosines, multiplied by scale.")
    if allclose(result, 2 * loss(8 * cosines)):
        raise WrongAnswer("The two cross entropies are added. Take their mean.")
    if not allclose(result, loss(8 * cosines)):
        raise WrongAnswer("The loss differs from the definition. Is the right answer of row i column i?")
