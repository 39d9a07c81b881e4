"""From prompts to images in one call.

pipe = TextToImagePipeline.from_pretrained()
pipe("a red seven").images[0].save("seven.png")
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from common.cli import check_choice
from common.conditioning import select
from common.errors import UserError
from common.files import write_atomically
from common.images import to_pixels
from common.protocols import Metadata, Model, Sampler, SamplerStep, Tokenizer
from common.sampling import BoundSampler, MakeDenoiser, respace_sampler, sample_batches, sample_trajectory
from common.training.checkpoints import load_model, save_weights
from lesson_04_text_conditioning import model as lesson_4
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import prompt_denoiser

LESSON = "lesson_05_cfg"
Pipeline = TypeVar("Pipeline", bound="TextToImagePipeline")


@dataclass(frozen=True)
class PipelineOutput:
    """Finished samples."""

    tensor: Float[Tensor, "n c h w"]  # in [-1, 1], values outside possible
    prompts: list[str]  # one per sample

    @property
    def images(self) -> list[Image.Image]:
        """The samples as PIL images."""
        return [Image.fromarray(pixels.squeeze()) for pixels in to_pixels(self.tensor)]


class TextToImagePipeline:
    """A trained text-to-image model: network, process and tokenizer.

    model: its network is a TextToImageNetwork; its metadata are saved with the weights.
    """

    lesson: str = LESSON  # whose checkpoints `from_pretrained` loads
    flag: str = "--checkpoint"  # what a command line calls them, for errors

    def __init__(self, model: Model, tokenizer: Tokenizer):
        self.network, self.process, self.metadata = model
        self.tokenizer = tokenizer

    @classmethod
    def from_pretrained(
        cls: type[Pipeline], checkpoint: str | Path | None = None, device: str = "auto"
    ) -> Pipeline:
        """Load a checkpoint: a .safetensors file or a run's folder; None means the pretrained weights.

        device: auto, cpu, cuda or mps. Raises UserError if the checkpoint or the device cannot be used.
        """
        model = load_model(checkpoint, cls.lesson, cls.build_from_metadata, device, cls.flag)
        return cls(model, cls.load_tokenizer(model.metadata))

    @staticmethod
    def build_from_metadata(metadata: Metadata) -> Model:
        """Return the untrained model of a checkpoint; other lessons override it."""
        return lesson_4.build_from_metadata(metadata)

    @staticmethod
    def load_tokenizer(metadata: Metadata) -> Tokenizer:
        """Return the tokenizer of a checkpoint; other lessons override it."""
        return lesson_4.tokenizer_from_metadata(metadata)

    def save_pretrained(self, path: str | Path) -> None:
        """Write weights and metadata to a .safetensors file that `from_pretrained` loads."""
        weights, metadata = self.network.state_dict(), {"lesson": self.lesson} | dict(self.metadata)
        write_atomically(path, lambda part: save_weights(part, weights, metadata))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the samples."""
        return self.network.image_shape

    def __call__(
        self,
        prompts: str | Sequence[str],
        guidance_scale: float = 3.0,
        steps: int = 20,
        sampler: str | Sampler = "dpm++",
        seed: int = 0,
        num_images_per_prompt: int = 1,
        progress_bar: bool = True,
        guidance_interval: tuple[int, int] | None = None,
        **unet_kwargs: Tensor,
    ) -> PipelineOutput:
        """Draw samples of one or several prompts.

        guidance_scale: 0 ignores the prompt, 1 is the plain conditional model, more follows it more closely.
        steps: network evaluations per sample (each of two images unless guidance_scale is 0 or 1). sampler:
        "ddpm", "ddim", "dpm++", or a function like those. seed: the same seed gives the same samples, image i
        whatever the number of images (up to the last bits, which depend on the batch size).
        guidance_interval: (low, high), the timesteps at which there is guidance; None means all. unet_kwargs:
        further inputs of the network, [N, ...] each. Raises UserError for values out of range.
        """
        prompts = self.expand_prompts(prompts, num_images_per_prompt)
        bound_sampler = self.bind_sampler(sampler, steps)
        make_denoiser = self.make_denoiser(prompts, guidance_scale, guidance_interval, **unet_kwargs)
        batches = -(-len(prompts) // 250)
        with tqdm(total=batches * steps, disable=not progress_bar, leave=False, unit="step") as bar:
            tensor = sample_batches(
                bound_sampler,
                make_denoiser,
                self.image_shape,
                len(prompts),
                seed=seed,
                device=str(self.device),
                on_step=lambda step: bar.update(),
            )
        return PipelineOutput(tensor, prompts)

    def trajectory(
        self,
        prompts: str | Sequence[str],
        guidance_scale: float = 3.0,
        steps: int = 20,
        sampler: str | Sampler = "dpm++",
        seed: int = 0,
    ) -> list[SamplerStep]:
        """Return every step of sampling, for animations; the arguments are those of a call."""
        prompts = self.expand_prompts(prompts, 1)
        make_denoiser = self.make_denoiser(prompts, guidance_scale)
        bound_sampler = self.bind_sampler(sampler, steps)
        n, device = len(prompts), str(self.device)
        return sample_trajectory(bound_sampler, make_denoiser, self.image_shape, n, seed=seed, device=device)

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def expand_prompts(self, prompts: str | Sequence[str], num_images_per_prompt: int) -> list[str]:
        """Return one prompt per sample. Raises UserError if there are none."""
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if not prompts or num_images_per_prompt < 1:
            raise UserError("there is nothing to draw: name at least one prompt and one image per prompt")
        return [prompt for prompt in prompts for _ in range(num_images_per_prompt)]

    def bind_sampler(self, sampler: str | Sampler, steps: int) -> BoundSampler:
        """Return the sampler with `steps` timesteps of this process. Raises UserError."""
        if isinstance(sampler, str):
            check_choice("sampler", sampler, SAMPLERS)
            sampler = SAMPLERS[sampler]
        return respace_sampler(sampler, self.process, steps)

    def make_denoiser(
        self,
        prompts: Sequence[str],
        guidance_scale: float,
        interval: tuple[int, int] | None = None,
        **unet_kwargs: Tensor,
    ) -> MakeDenoiser:
        """Return indices -> guided denoiser, as `common.sampling` takes it. Raises UserError."""
        if not 0 <= guidance_scale < float("inf"):
            raise UserError(
                f"a guidance scale of {guidance_scale}: it must be 0 (no caption), 1 (plain model) or greater"
            )
        return lambda indices: prompt_denoiser(
            self.network,
            self.tokenizer,
            [prompts[i] for i in indices.tolist()],
            guidance_scale,
            interval,
            **select(unet_kwargs, indices),
        )
