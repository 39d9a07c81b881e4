"""What checks the reader's functions of miniglide.ipynb, against independent values."""

from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from common.exercises import WrongAnswer, allclose, expect_shape, numbered


@numbered("6.2")
def area_downsample(answer: Callable) -> None:
    """Compare with average pooling, also of areas that are not square."""
    torch.manual_seed(0)
    images = torch.randn(2, 3, 8, 8)
    result = answer(images, 4)
    if isinstance(result, Tensor) and result.shape == (2, 3, 2, 2):
        raise WrongAnswer(
            "Its sides are divided by size. size is the number of pixels per side of the result."
        )
    expect_shape(result, (2, 3, 4, 4))
    if allclose(result, images[:, :, ::2, ::2]):
        raise WrongAnswer("One pixel of each 2x2 is kept, and three are lost. Take the mean of all four.")
    if allclose(result, F.avg_pool2d(images, 2) * 4):
        raise WrongAnswer("That is the sum of the four pixels. Take the mean.")
    if allclose(result, F.max_pool2d(images, 2)):
        raise WrongAnswer("That is the largest of the four pixels. Take the mean.")
    if not allclose(result, F.avg_pool2d(images, 2)):
        raise WrongAnswer(
            "The pixels are mixed up: each result is the mean of a square of neighboring pixels."
        )
    wide = torch.randn(2, 3, 8, 12)
    for size, area in ((2, (4, 6)), (4, (2, 3))):
        result = answer(wide, size)
        expect_shape(result, (2, 3, size, size))
        if not allclose(result, F.avg_pool2d(wide, area)):
            raise WrongAnswer(
                f"Of 8x12 pixels, size = {size} must take the means of {area[0]}x{area[1]} each."
            )


@numbered("6.3")
def shift_alpha_bar(answer: Callable) -> None:
    """The ratio of signal and noise must be divided, and both must still add up to 1."""
    alpha_bar = torch.tensor([0.999, 0.7, 0.5, 0.2, 0.001], dtype=torch.float64)
    result = answer(alpha_bar, 4.0)
    expect_shape(result, (5,))
    if allclose(result, alpha_bar / 4):
        raise WrongAnswer("alpha_bar itself is divided. Divide the ratio alpha_bar / (1 - alpha_bar).")
    wanted, found = alpha_bar / (1 - alpha_bar) / 4, result / (1 - result)
    if allclose(result, wanted):
        raise WrongAnswer("That is the new ratio. Solve ratio = alpha_bar / (1 - alpha_bar) for alpha_bar.")
    if allclose(found, 16 * wanted):
        raise WrongAnswer("The ratio is multiplied by 4. Larger images need more noise, so divide it.")
    if allclose(found, 2 * wanted):
        raise WrongAnswer("The ratio is divided by 2. It is a ratio of variances, so the factor is 4.")
    if not torch.allclose(found, wanted, rtol=1e-6):
        raise WrongAnswer(f"For alpha_bar = 0.5 the ratio must become 0.25; yours becomes {found[2]:.3f}.")


@numbered("6.4")
def patchify(answer: Callable) -> None:
    """Compare with PyTorch's pixel_unshuffle."""
    images = torch.arange(2 * 3 * 4 * 6.0).view(2, 3, 4, 6)
    result = answer(images, 2)
    expect_shape(result, (2, 12, 2, 3))
    wanted = F.pixel_unshuffle(images, 2)
    if torch.equal(result, images.reshape(2, 12, 2, 3)):
        raise WrongAnswer("A plain reshape puts distant pixels into one patch. Split both sides first.")
    if not torch.equal(result.sort(1).values, wanted.sort(1).values):
        raise WrongAnswer("A position must hold the pixels of one 2x2 square, of all three channels.")
    if not torch.equal(result, wanted):
        raise WrongAnswer(
            "The right pixels, but in another order than pixel_unshuffle's: channel, then row, then column."
        )


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
            x, captions = answer(Path(name))
        except (TypeError, ValueError, RuntimeError) as error:
            raise WrongAnswer(
                f"It fails ({type(error).__name__}). Gray and CMYK images need convert('RGB'), and "
                "all images one size."
            ) from error
    if not isinstance(x, Tensor):
        raise WrongAnswer("Return a tensor of all images (torch.stack) and a list of captions.")
    if x.shape == (4, 64, 64, 3):
        raise WrongAnswer("The channels come last. A convolution expects [N, 3, H, W]: permute.")
    expect_shape(x, (4, 3, 64, 64))
    if list(captions) != ["a ramp", "a red wall", "a gray card", "café"]:
        if sorted(map(str.strip, captions)) == sorted(["a ramp", "a red wall", "a gray card", "café"]):
            raise WrongAnswer(f"The captions are {captions}. Sort the files, and strip white space.")
        raise WrongAnswer(f"The captions are {captions}. Each is in the .txt of the same name, in UTF-8.")
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

    def loss_fn(network: Line, x: Tensor, y: Tensor) -> Tensor:
        sizes.append(len(x))
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
    result = gradient(2)
    if sizes == [10]:
        raise WrongAnswer("The loss was computed on the whole batch at once. Split the batch into parts.")
    if allclose(result, wanted + 7):
        raise WrongAnswer("The gradient of the step before is still in it: call zero_grad first.")
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
