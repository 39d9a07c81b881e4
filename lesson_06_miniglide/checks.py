"""What checks the reader's functions of miniglide.ipynb, against independent values.

The checks of exercise 6.4 are in training/checks.py, those of exercise 6.6 in training/bug_checks.py.
"""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, numbered
from lesson_06_miniglide.training.bug_checks import test_captions_dropped as test_captions_dropped
from lesson_06_miniglide.training.bug_checks import test_every_timestep as test_every_timestep
from lesson_06_miniglide.training.bug_checks import test_finite as test_finite
from lesson_06_miniglide.training.bug_checks import test_range as test_range
from lesson_06_miniglide.training.bug_checks import test_schedule as test_schedule
from lesson_06_miniglide.training.checks import text_to_image as text_to_image
from lesson_06_miniglide.training.checks import text_to_image_loss as text_to_image_loss


def save_examples(folder: Path) -> None:
    """Write images of several modes and sizes, with captions, in an order that the file system may change."""
    ramp = np.linspace(0, 255, 64).round().astype(np.uint8)[None, :, None].repeat(64, 0).repeat(3, 2)
    wide = Image.new("RGB", (128, 64), (255, 51, 51))
    wide.paste((0, 0, 255), (104, 0, 128, 64))
    examples = {
        "b_wide": (wide, "a red wall\n"),
        "a_ramp": (Image.fromarray(ramp), "a ramp"),
        "d_ink": (Image.new("RGB", (20, 30), (51, 51, 51)).convert("CMYK"), "café"),
        "c_gray": (Image.new("L", (20, 30), 51), " a gray card "),
    }
    for name, (image, caption) in examples.items():
        image.save(folder / f"{name}.jpg", quality=100, subsampling=0)
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8")


@numbered("6.1")
def load_batch(answer: Callable) -> None:
    """A folder with known images: a ramp of gray values, a wide image, gray, and four inks."""
    with TemporaryDirectory() as name:
        save_examples(Path(name))
        try:
            result = answer(Path(name))
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongAnswer(
                f"It fails ({type(error).__name__}). Gray and CMYK images need convert('RGB'), and "
                "all images one size."
            ) from error
    if not isinstance(result, tuple) or len(result) != 2:
        raise WrongAnswer("Return two things: a tensor of all images, and the list of captions.")
    x, captions = result
    if not isinstance(x, Tensor):
        raise WrongAnswer("Return a tensor of all images (torch.stack) and a list of captions.")
    if x.shape == (4, 64, 64, 3):
        raise WrongAnswer("The channels come last. A convolution expects [N, 3, H, W]: permute.")
    expect_shape(x, (4, 3, 64, 64))
    if list(captions) != ["a ramp", "a red wall", "a gray card", "café"]:
        if sorted(map(str.strip, captions)) == sorted(["a ramp", "a red wall", "a gray card", "café"]):
            raise WrongAnswer(f"The captions are {captions}. Sort the files, and strip white space.")
        raise WrongAnswer(f"The captions are {captions}. Each is in the .txt of the same name, in UTF-8.")
    if x.dtype != torch.float32:
        raise WrongAnswer(f"The images are {x.dtype}. The networks compute in float32: call .float().")
    if x.min() >= 0:
        raise WrongAnswer(f"The values run from {x.min():.0f} to {x.max():.0f}; they must lie in [-1, 1].")
    ramp = torch.linspace(-1, 1, 64).expand(64, 64)
    if torch.allclose(x[0, 0], ramp.T, atol=0.05):
        raise WrongAnswer(
            "Rows and columns are exchanged: the order after permute must be channel, row, column."
        )
    if not torch.allclose(x[0, 0], ramp, atol=0.05):
        raise WrongAnswer("A gray value of 0 must become -1 and 255 must become 1.")
    left, right = x[1].mean(1)[:, [8, 60]].T  # RGB of the two colours of the wide image
    if abs(left[0] - 1) > 0.1 or abs(right[2] - 1) > 0.1:
        raise WrongAnswer(
            "A part of the wide image is missing. Resize the whole image to 64x64; do not crop."
        )
    if not torch.allclose(x[2:], torch.tensor(-0.6), atol=0.05):
        raise WrongAnswer(
            "The gray image or the CMYK image has wrong values. Is convert('RGB') the first step?"
        )


@numbered("6.2")
def shift_schedule(answer: Callable) -> None:
    """The ratio of signal and noise must be divided by k squared, and the factor must fit to it."""
    alpha_bar = torch.tensor([0.999, 0.7, 0.5, 0.2, 0.001], dtype=torch.float64)
    snr = alpha_bar / (1 - alpha_bar)
    for k in (2, 4):
        result = answer(alpha_bar, k)
        if not isinstance(result, tuple) or len(result) != 2:
            raise WrongAnswer("Return two tensors: the shifted alpha_bar and the factor.")
        shifted, factor = result
        expect_shape(shifted, (5,))
        found = shifted / (1 - shifted)
        if k == 4 and allclose(found, snr / 4):
            raise WrongAnswer("For k = 4 the ratio is still divided by 4. The divisor depends on k.")
        if allclose(shifted, alpha_bar / k**2):
            raise WrongAnswer("alpha_bar itself is divided. Divide alpha_bar / (1 - alpha_bar), and solve.")
        if allclose(shifted, snr / k**2):
            raise WrongAnswer("That is the new ratio. Solve it for alpha_bar.")
        if allclose(found, k**2 * snr):
            raise WrongAnswer("The ratio is multiplied. Means contain less noise, so x_t needs more.")
        if allclose(found, snr / k):
            raise WrongAnswer("The ratio of variances is divided by k. What is the variance of k x k means?")
        if not torch.allclose(found, snr / k**2, rtol=1e-6):
            raise WrongAnswer(
                f"For k = {k} and alpha_bar = 0.5, image and noise must be equally strong in the k x k "
                f"means. With your {shifted[2]:.3f} their ratio is {k**2 * found[2]:.3f}."
            )
        wanted = (alpha_bar / shifted).sqrt()
        if allclose(torch.as_tensor(factor), wanted**2):
            raise WrongAnswer("x_0 is multiplied by the root of alpha_bar. Take the root of your factor.")
        if allclose(torch.as_tensor(factor), 1 / wanted):
            raise WrongAnswer("The factor is upside down: the means contain x_0 at sqrt(shifted).")
        if not allclose(torch.as_tensor(factor), wanted):
            raise WrongAnswer(
                "shifted is right, the factor is not. It must fulfill f sqrt(shifted) = sqrt(alpha_bar) "
                "and f sqrt(1 - shifted) / k = sqrt(1 - alpha_bar)."
            )


@numbered("6.3")
def on_patches(answer: Callable) -> None:
    """A network that keeps its input and returns random values, for two patch sizes."""
    x_t, t = torch.randn(2, 3, 8, 8), torch.tensor([3, 4])
    for size in (2, 4):
        output = torch.randn(2, 6 * size**2, 8 // size, 8 // size)
        inputs: list[tuple[Tensor, ...]] = []

        def network(x: Tensor, t: Tensor, inputs: list = inputs, output: Tensor = output) -> Tensor:
            inputs.append((x, t))
            return output

        result = answer(network, x_t, t, size)
        if len(inputs) != 1:
            raise WrongAnswer("Call the network once, with the patches and t.")
        patches, wanted = inputs[0][0], F.pixel_unshuffle(x_t, size)
        if patches.shape == (2, 12, 4, 4) and size == 4:
            raise WrongAnswer("With size = 4, the network still gets patches of 2x2 pixels.")
        if patches.shape != wanted.shape:
            raise WrongAnswer(
                f"For patches of {size}x{size} pixels of 8x8 images, the network must get the shape "
                f"{tuple(wanted.shape)}, and gets {tuple(patches.shape)}."
            )
        if not torch.equal(patches, wanted):
            raise WrongAnswer("The channels of a position are not its patch. Use F.pixel_unshuffle.")
        if inputs[0][1] is not t:
            raise WrongAnswer("The network must get the timesteps t.")
        if isinstance(result, Tensor) and result.shape == output.shape:
            raise WrongAnswer("The result is still one position per patch. Turn its channels into pixels.")
        expect_shape(result, (2, 6, 8, 8))
        if not torch.equal(result, F.pixel_shuffle(output, size)):
            raise WrongAnswer("The pixels of the result are in a wrong order. Use F.pixel_shuffle.")


class Line(nn.Module):
    """Two weights: x -> w x + b."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor(0.1))


@numbered("6.5")
def accumulate_gradients(answer: Callable) -> None:
    """Compare with the gradient of the whole batch, also if the micro-batches are not equally large."""
    torch.manual_seed(0)
    batch, sizes = (torch.randn(10), torch.randn(10)), []
    before: list[float] = []  # the gradient at each evaluation of the loss

    def loss_fn(network: Line, x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
        before.append(0.0 if network.weight.grad is None else network.weight.grad.item())
        return (network.weight * x + network.bias - y).square()

    def gradient(parts: int | None) -> Tensor:
        network = Line()
        network.weight.grad, network.bias.grad = torch.tensor(7.0), torch.tensor(7.0)
        if parts is None:
            network.zero_grad()
            loss_fn(network, *batch).mean().backward()
        else:
            answer(network, loss_fn, batch, parts)
        if network.weight.grad is None or network.bias.grad is None:
            raise WrongAnswer("There is no gradient: call backward for each micro-batch.")
        return torch.stack([network.weight.grad, network.bias.grad])

    wanted = gradient(None)
    sizes.clear()
    before.clear()
    result = gradient(2)
    if sizes == [10]:
        raise WrongAnswer("The loss was computed on the whole batch at once. Split the batch into parts.")
    if allclose(result, wanted + 7):
        raise WrongAnswer("The gradient of the step before is still in it: call zero_grad first.")
    if allclose(result, wanted) and before[0] == before[1]:
        raise WrongAnswer(
            "There is no backward between the parts, so the activations of all parts are in memory at once. "
            "Call backward for each part."
        )
    if allclose(result, 10 * wanted):
        raise WrongAnswer(
            "That is the gradient of the sum. Divide by the number of images in the whole batch."
        )
    if allclose(result, 2 * wanted):
        raise WrongAnswer(
            "Twice the gradient. The mean of a micro-batch counts only for its part of the batch."
        )
    if not allclose(result, wanted) and sizes == [5, 5]:
        raise WrongAnswer("The gradient is not that of the batch. Is zero_grad called between the parts?")
    if not allclose(gradient(3), wanted):  # micro-batches of 4, 4 and 2
        raise WrongAnswer(
            "With 10 images in 3 parts, the micro-batches have 4, 4 and 2 images, and the gradient is wrong. "
            "Divide the sum of the losses by the size of the whole batch."
        )
