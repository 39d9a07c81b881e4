"""What checks the reader's functions of editing.ipynb and clip_guidance.ipynb.

The checks of upsampling.ipynb are in networks/upsampler_checks.py.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from common.exercises import WrongAnswer, allclose, expect_shape, explaining, numbered
from lesson_06_miniglide.networks.upsampler_checks import upsampler_inputs as upsampler_inputs
from lesson_06_miniglide.networks.upsampler_checks import upsampler_loss as upsampler_loss


def noisy(image: Tensor, alpha_bar: float, noise: Tensor) -> Tensor:
    """Return an image with noise, by eq. 4 of lesson 1."""
    return alpha_bar**0.5 * image + (1 - alpha_bar) ** 0.5 * noise


@numbered("6.10, insert_known")
def insert_known(answer: Callable) -> None:
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
        raise WrongAnswer("The known pixels have no noise. In training, all pixels had the same amount.")
    if allclose(left, (sampled + wanted)[..., :4]):
        raise WrongAnswer("The known pixels are added to what was sampled. They must replace it.")
    if allclose(left, (image + 0.6**0.5 * noise)[..., :4]):
        raise WrongAnswer("The known image has its full strength. In x_t its factor is sqrt(alpha_bar).")
    if allclose(left, (0.4 * image + 0.6 * noise)[..., :4]):
        raise WrongAnswer("The factors are the square roots of alpha_bar and 1 - alpha_bar.")
    if not allclose(left, wanted[..., :4]):
        raise WrongAnswer("The known pixels need the factors of x_t, at this alpha_bar.")


@numbered("6.10, repaint_step")
def repaint_step(answer: Callable) -> None:
    """Numbers in place of images: which functions are called, in which order, on what."""
    calls: list[str] = []

    def traced(name: str, change: float) -> Callable:
        def function(x: Tensor) -> Tensor:
            calls.append(name)
            return 2 * x + change

        return function

    reverse, insert, forward = (traced("reverse_step", 1), traced("insert", 10), traced("forward_step", 100))

    def run(repeats: int) -> tuple[Tensor, list[str]]:
        calls.clear()
        result = answer(reverse, insert, forward, torch.tensor([3.0]), repeats)
        expect_shape(result, (1,))
        return result, list(calls)

    result, order = run(1)
    if order == ["reverse_step", "insert", "forward_step"]:
        raise WrongAnswer("The last repetition must end at x_{t-1}: no forward step after it.")
    if order != ["reverse_step", "insert"]:
        called = ", ".join(order) or "nothing"
        raise WrongAnswer(f"One repetition called {called}; it is reverse_step, then insert.")
    result, order = run(3)
    if order == ["reverse_step", "forward_step"] * 2 + ["reverse_step", "insert"]:
        raise WrongAnswer(
            "Insert after every reverse step; else the forward step starts from the network's own pixels."
        )
    wanted = ["reverse_step", "insert", "forward_step"] * 2 + ["reverse_step", "insert"]
    if order != wanted:
        raise WrongAnswer(f"Three repetitions called {', '.join(order)}; wanted is {', '.join(wanted)}.")
    x = torch.tensor([3.0])
    for name in wanted:
        x = {"reverse_step": reverse, "insert": insert, "forward_step": forward}[name](x)
    if not allclose(result, x):
        raise WrongAnswer("Each repetition must start from the result of the forward step before it.")


@numbered("6.11, expand_inputs")
def expand_inputs(answer: Callable) -> None:
    """A convolution of seven channels must do to the first three what it did before."""
    torch.manual_seed(0)
    weight = torch.randn(5, 3, 3, 3)
    result = answer(weight, 4)
    expect_shape(result, (5, 7, 3, 3))
    if allclose(result[:, 4:], weight):
        raise WrongAnswer("The new inputs come first. They come after the three of x_t, so at the end.")
    if not allclose(result[:, :3], weight):
        raise WrongAnswer("The weights of the first three inputs must stay as they are.")
    if not allclose(result[:, 3:], torch.zeros(5, 4, 3, 3)):
        raise WrongAnswer("The weights of the new inputs must be zero, so that they change nothing.")


@numbered("6.11, inpainting_inputs")
def inpainting_inputs(answer: Callable) -> None:
    """Half of an image is known; the network may not see the other half."""
    torch.manual_seed(0)
    image, keep = torch.randn(2, 3, 8, 8), torch.zeros(2, 1, 8, 8)
    keep[..., :4] = 1
    result = answer(image, keep)
    if tuple(result.shape) == (2, 3, 8, 8):
        raise WrongAnswer("The mask is missing: a known gray pixel and an unknown one look alike.")
    expect_shape(result, (2, 4, 8, 8))
    if allclose(result[:, :3], image):
        raise WrongAnswer("The network sees the pixels that it has to fill. It would learn to copy.")
    if allclose(result[:, :3], image * (1 - keep)) or allclose(result[:, 3:], 1 - keep):
        raise WrongAnswer("The two regions are exchanged: keep is 1 where the image is known.")
    if allclose(result[:, :1], keep):
        raise WrongAnswer("The order is: three channels of the image, then the mask.")
    if not (allclose(result[:, :3], image * keep) and allclose(result[:, 3:], keep)):
        raise WrongAnswer("The channels must be the image, 0 where it is unknown, and the mask.")


@numbered("6.12")
def sdedit_start(answer: Callable) -> None:
    """A quarter, a half, all of 100 steps."""
    torch.manual_seed(0)
    alpha_bar, (image, noise) = torch.linspace(0.99, 0.01, 100), torch.randn(2, 2, 3, 8, 8)
    for strength in (0.25, 0.5, 1.0):
        result = answer(image, strength, alpha_bar, noise)
        if not (isinstance(result, tuple) and len(result) == 2):
            raise WrongAnswer("Return two values: t and x_t.")
        t, x_t = result
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
    scale = torch.tensor(8.0)
    result = answer(images, captions, scale)
    expect_shape(result, ())
    if allclose(result, loss(8 * images @ captions.T)):
        raise WrongAnswer("Long vectors count more. Normalize every vector to length 1 first.")
    if allclose(result, loss(8 * F.normalize(images, dim=0) @ F.normalize(captions, dim=0).T)):
        raise WrongAnswer("You normalize each coordinate over the batch. Normalize each vector: dim=1.")
    if any(allclose(result, loss(8 * cosines, (dim,))) for dim in (0, 1)):
        raise WrongAnswer("Only one direction. Ask for each image's caption and for each caption's image.")
    if allclose(result, loss(cosines / 8)) or allclose(result, loss(cosines)):
        raise WrongAnswer("The logits are the cosines, multiplied by scale.")
    if allclose(result, 2 * loss(8 * cosines)):
        raise WrongAnswer("The two cross entropies are added. Take their mean.")
    if allclose(result, loss(scale.exp() * cosines)):
        raise WrongAnswer("scale is the factor itself (CLIP's code stores its logarithm). Do not take exp.")
    p, p_transposed = (8 * cosines).softmax(1), (8 * cosines.T).softmax(1)
    if any(allclose(result, (loss(p, (1,)) + loss(q, (1,))) / 2) for q in (p.T, p_transposed)):
        raise WrongAnswer("F.cross_entropy takes logits: no softmax before it.")
    if allclose(result, -cosines.diagonal().mean()):
        raise WrongAnswer("The other captions of the batch are missing: they are the wrong classes.")
    if allclose(result, F.binary_cross_entropy_with_logits(8 * cosines, torch.eye(6))):
        raise WrongAnswer("You decide about each pair by itself. Choose one of N captions: F.cross_entropy.")
    if not allclose(result, loss(8 * cosines)):
        raise WrongAnswer("The loss differs from the definition. Is the right answer of row i column i?")


@numbered("6.16")
def similarity_gradient(answer: Callable) -> None:
    """An encoder whose gradient is known, called as a sampler calls it: without gradients."""
    torch.manual_seed(0)
    weight, x_t, t = torch.randn(48, 5), torch.randn(2, 3, 4, 4), torch.tensor([7, 7])
    captions = F.normalize(torch.randn(2, 5), dim=1)
    seen: list[Tensor] = []

    def encode_image(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        return F.normalize(x.flatten(1) @ weight, dim=1)

    x = x_t.clone().requires_grad_(True)
    wanted = torch.autograd.grad((encode_image(x, t) * captions).sum(), x)[0]
    seen.clear()
    message = "Samplers run without gradients. Put your code below `with torch.enable_grad():` (lesson 3)."
    with torch.no_grad(), explaining("does not require grad", message):
        result = answer(encode_image, captions, x_t, t, 10.0)
    expect_shape(result, (2, 3, 4, 4))
    if result.requires_grad:
        raise WrongAnswer(
            "The result still has a graph, which grows with each step. Use torch.autograd.grad."
        )
    if not all(torch.equal(each, t) for each in seen):
        raise WrongAnswer("The encoder must be given the timestep t of x_t.")
    if allclose(result, wanted):
        raise WrongAnswer("The scale is missing.")
    if allclose(result, 5 * wanted):
        raise WrongAnswer("With a mean, each gradient depends on the size of the batch. Take the sum.")
    if allclose(result, -10 * wanted):
        raise WrongAnswer("The sign is wrong: samples must move to where the cosine is larger.")
    if not allclose(result, 10 * wanted):
        raise WrongAnswer("Image i has caption i alone: multiply the embeddings elementwise, then add up.")
