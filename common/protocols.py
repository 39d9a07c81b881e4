"""The contracts between the parts: what a network, a sampler, a process, a data set and a loss must offer.

Nothing has to inherit from these classes. Whatever has the methods fits: a sampler of lesson 1 can sample
from a network of lesson 6, and both work with a process that you write yourself (see CONTRIBUTING.md).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

Images: TypeAlias = Float[Tensor, "n c h w"]  # in [-1, 1]
# What a network is conditioned on: a tensor [N, ...], or any nesting of tuples, dicts and lists of such
Conditioning: TypeAlias = Any
Metadata: TypeAlias = Mapping[str, Any]  # JSON: saved with weights, enough to build the network again


@runtime_checkable
class Denoiser(Protocol):
    """A network with its conditioning bound: (x_t, t) -> output.

    x_t: [N, C, H, W]. t: int64 [N], timesteps of the process that the network was trained on. The first C
    channels of the output are the prediction that process and sampler expect: for GaussianDiffusion eps_hat,
    the predicted noise. More channels may hold a learned variance.
    """

    def __call__(self, x_t: Tensor, t: Tensor, /) -> Tensor: ...


@runtime_checkable
class TextToImageNetwork(Protocol):
    """An nn.Module that draws what captions say: (x_t, t, text=...) -> output, as a Denoiser's.

    Its inputs besides x_t and t have names, and the first axis of each is N.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of its images."""
        ...

    def encode_text(self, tokens: Any, mask: Any) -> Conditioning:
        """Return what `forward` takes as `text`: captions are encoded once and used at every step.

        tokens, mask: [N, L], as the tokenizer returns them; the mask is False where there is no caption.
        """
        ...

    def parameters(self) -> Iterator[nn.Parameter]: ...

    def __call__(self, x_t: Any, t: Any, **conditioning: Any) -> Tensor: ...


@runtime_checkable
class Tokenizer(Protocol):
    """Turns captions into numbers."""

    def encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the tokens of each caption and a mask that is True where there is one, [N, L] each."""
        ...


class SamplerStep(NamedTuple):
    """What a sampler yields for each timestep, noisiest first. The last `x_prev` is the sample."""

    t: int  # index into the process that was sampled
    x_t: Tensor  # [N, C, H, W]
    x_0: Tensor  # predicted from x_t
    x_prev: Tensor  # x_{t-1}


@runtime_checkable
class Process(Protocol):
    """A noising process and its discretization, such as lesson 1's GaussianDiffusion.

    A sampler may ask its process for more than this; a sampler and its process belong together.
    """

    num_timesteps: int

    def respace_evenly(self, num_steps: int) -> "Process":
        """Return the same process with only `num_steps` timesteps. Raises ValueError if there are fewer."""
        ...

    def predict(self, denoiser: Denoiser, x_t: Any, t: Any) -> Tensor:
        """Return the denoiser's output at index t of this process, translated to the original timesteps."""
        ...


@runtime_checkable
class Sampler(Protocol):
    """A function that turns noise into samples: (process, denoiser, x_T, generator) -> one step per timestep.

    x_T: noise [N, C, H, W]. All randomness comes from `generator`. If it is drawn with lesson 1's
    `gaussian_noise`, a sample's noise does not depend on how many samples there are (see NoiseStreams).
    """

    def __call__(
        self, process: Any, denoiser: Denoiser, x_T: Tensor, generator: Any = None, /
    ) -> Iterator[SamplerStep]: ...


class NoiseStreams(torch.Generator):
    """A sampler's `generator` with a stream of its own for each sample of a batch.

    Image 3 of seed 0 is then always the same, however many are drawn together. seed: of all samples. indices:
    of the samples in this batch; sample i has the same stream in every batch. For PyTorch's own functions it
    is an ordinary generator, seeded, whose numbers belong to the batch and not to a sample.
    """

    streams: list[torch.Generator]

    def __new__(cls, seed: int, indices: Sequence[int]) -> "NoiseStreams":
        self = super().__new__(cls)
        self.manual_seed(seed)
        # A CPU generator keeps 32 bits of its seed. Counting from a random number gives all samples of a seed
        # different streams, and other ones than those of the next seed.
        first = int(torch.randint(2**32, (), generator=self))
        self.streams = [torch.Generator().manual_seed((first + i) % 2**32) for i in indices]
        return self

    def randn(self, shape: Sequence[int]) -> Tensor:
        """Draw white noise [N, ...] on the CPU, row i from stream i. Raises ValueError for another N."""
        if shape[0] != len(self.streams):
            raise ValueError(f"noise for {shape[0]} samples, but there are {len(self.streams)} streams")
        return torch.stack([torch.randn(shape[1:], generator=stream) for stream in self.streams])


@runtime_checkable
class Dataset(Protocol):
    """Examples that can be drawn in batches; `name` tells runs on different data apart."""

    @property
    def name(self) -> str: ...

    def __len__(self) -> int: ...

    def batch(self, indices: Any) -> tuple[Tensor, ...]:
        """Return the tensors of these examples [B, ...] (x_0 first), as the loss takes them."""
        ...


@runtime_checkable
class CaptionedDataset(Dataset, Protocol):
    """Images with captions: `batch` returns (x_0 [B, C, H, W], tokens [B, L], mask [B, L]).

    `__getitem__` returns one example, so that PyTorch's DataLoader takes the data set, too.
    """

    def __getitem__(self, index: int) -> tuple[Tensor, ...]: ...


@runtime_checkable
class Loss(Protocol):
    """(network, *batch) -> one number per example, [N]. Randomness comes from torch's global generator.

    A loss with a `state_dict` has it saved and restored with the training run.
    """

    def __call__(self, network: Any, /, *batch: Any) -> Tensor: ...


LossAtT: TypeAlias = Callable[
    [Any, Denoiser, Any, Any, Any], Tensor
]  # (process, denoiser, x_0, t, noise) -> [N]
LogVarianceFn: TypeAlias = Callable[
    [Any, Tensor, Any, Any], Tensor
]  # (process, output, x_t, t) -> log variance
DenoisedFn: TypeAlias = Callable[[Tensor], Tensor]  # predicted x_0 -> the x_0 that is used


class Model(NamedTuple):
    """A network with everything that is needed to train it or to sample from it."""

    network: Any  # an nn.Module
    process: Any  # a Process
    metadata: Metadata  # the settings that `build_from_metadata` of its lesson builds it from
