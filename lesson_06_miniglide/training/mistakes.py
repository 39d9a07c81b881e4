"""Training set-ups of which five have a bug each; nothing crashes. For exercise 6.6 of miniglide.ipynb.

The bugs of A, B, D and E are in the trainer of the report that this lesson follows (ERRATA.md).
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_06_miniglide.networks.presets import shifted_cosine_betas

T = 1000  # timesteps


class Padding(nn.Module):
    """The part of a text transformer that stands in for dropped and missing tokens."""

    def __init__(self, embedding: Float[Tensor, "length width"]):
        super().__init__()
        self.embedding = nn.Parameter(embedding)

    def forward(
        self, x: Float[Tensor, "n length width"], mask: Bool[Tensor, "n length"]
    ) -> Float[Tensor, "n length width"]:
        """Return x where the mask is True, and the embedding elsewhere."""
        return torch.where(mask[..., None], x, self.embedding)


class Setup(NamedTuple):
    """What comes before the loss of a training step."""

    scale: Callable[[UInt8[Tensor, "n c h w"]], Float[Tensor, "n c h w"]]
    draw_t: Callable[[int], Int[Tensor, "n"]]  # number of images -> timesteps
    drop: Callable[[Bool[Tensor, "n length"]], Bool[Tensor, "n length"]]  # caption dropout of 20 %
    network: Callable[[], nn.Module]
    process: GaussianDiffusion  # for images of 64x64 pixels: shifted by section 4


def initialized() -> nn.Module:
    """Return a padding embedding with random values."""
    return Padding(0.02 * torch.randn(24, 64))


def uninitialized() -> nn.Module:
    """Return a padding embedding with one NaN, which stands for memory that `torch.empty` allocated.

    What such memory holds differs from run to run. If it is finite, no test of finiteness finds it.
    """
    embedding = torch.zeros(24, 64)
    embedding[7, 11] = float("nan")
    return Padding(embedding)


RIGHT = Setup(
    scale=lambda pixels: pixels.float() / 127.5 - 1,
    draw_t=lambda n: torch.randint(0, T, (n,)),
    drop=lambda mask: mask & (torch.rand(len(mask)) >= 0.2)[:, None],
    network=initialized,
    process=GaussianDiffusion(shifted_cosine_betas(T)),
)
SETUPS = {
    "A": RIGHT._replace(drop=lambda mask: mask.clone()),
    "B": RIGHT._replace(network=uninitialized),
    "C": RIGHT,
    "D": RIGHT._replace(draw_t=lambda n: torch.randint(0, T - 1, (n,))),
    "E": RIGHT._replace(scale=lambda pixels: pixels.float() / 255),
    "F": RIGHT._replace(process=GaussianDiffusion(shifted_cosine_betas(T, divide_snr_by=1 / 4))),
}


def run_tests(setup: Setup, pixels: UInt8[Tensor, "n c h w"], tests: Sequence[Callable]) -> dict[str, str]:
    """Return "ok" or "FAILS" for each of five tests, in the order of the parts of `Setup`."""
    parts = (setup.scale(pixels), setup.draw_t, setup.drop, setup.network(), setup.process)
    results = {}
    for test, part in zip(tests, parts):
        try:
            test(part)
            results[test.__name__] = "ok"
        except AssertionError:
            results[test.__name__] = "FAILS"
    return results
