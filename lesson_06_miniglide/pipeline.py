"""Lesson 6's pipelines: base models, upsamplers, and cascades of the two."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.errors import UserError
from common.protocols import Metadata, Model, Sampler, Tokenizer
from common.training.checkpoints import weights_hash
from lesson_04_text_conditioning import model as lesson_4
from lesson_05_cfg.pipeline import PipelineOutput, TextToImagePipeline
from lesson_06_miniglide import model as lesson_6
from lesson_06_miniglide.networks.frozen_t5 import encoder_from_metadata, uses_t5
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.networks.upsampler import (
    FACTOR,
    LOW_RES,
    area_downsample,
    noise_augment,
    num_noise_levels,
)

# The noise of a low-resolution image and of the upsampler's samples must differ from the base model's.
AUGMENT_SEED, UPSAMPLE_SEED = 715_827_883, 2 * 715_827_883


class MiniGlidePipeline(TextToImagePipeline):
    """A base model of lesson 6: 64x64 images, or 16x16 as the first half of a cascade."""

    lesson = LESSON

    @classmethod
    def from_pretrained(cls, checkpoint: str | Path | None = None, device: str = "auto") -> Any:
        """Load a checkpoint, by default the pretrained weights. Raises UserError if it is of another kind."""
        pipe = super().from_pretrained(checkpoint, device)
        cls.check_kind(lesson_6.unwrap(pipe.network).upsample)
        pipe.network.requires_grad_(True)  # autocast caches the bf16 copies only of trainable weights
        return pipe

    @staticmethod
    def check_kind(upsample: bool) -> None:
        if upsample:
            raise UserError("--checkpoint is an upsampler; name it with --upsampler")

    @staticmethod
    def build_from_metadata(metadata: Metadata) -> Model:
        return lesson_6.build_from_metadata(metadata)

    @staticmethod
    def load_tokenizer(metadata: Metadata) -> Tokenizer:
        """Return the tokenizer of a checkpoint, or the frozen encoder that it needs. Raises UserError."""
        if uses_t5(metadata):
            return encoder_from_metadata(metadata["text"])
        return lesson_4.tokenizer_from_metadata(metadata)

    @cached_property
    def name(self) -> str:
        """A short name of the weights, wherever they are stored."""
        return weights_hash(self.network)


class UpsamplerPipeline(MiniGlidePipeline):
    """An upsampler: 16x16 to 64x64 images, or with the published network's size 64x64 to 256x256."""

    flag = "--upsampler"

    @property
    def low_res(self) -> int:
        """Pixels of a side of the images that it enlarges."""
        return self.image_shape[-1] // FACTOR

    @staticmethod
    def check_kind(upsample: bool) -> None:
        if not upsample:
            raise UserError("--upsampler is not an upsampler; train one with --preset tiny_upsampler")

    def super_resolve(
        self,
        images: Float[Tensor, "n c h w"],
        prompts: Sequence[str],
        noise_level: int,
        steps: int = 20,
        sampler: str | Sampler = "dpm++",
        seed: int = 0,
    ) -> Tensor:
        """Return `images` in the upsampler's resolution; those above its `low_res` are downsampled first.

        noise_level: the timestep whose noise the low-resolution images get. There is no guidance.
        """
        low_res, level = area_downsample(images, self.low_res), torch.full((len(images),), noise_level)
        generator = torch.Generator().manual_seed(seed + AUGMENT_SEED)  # the noise of image i is the i-th
        inputs = noise_augment(self.process, low_res, level, generator)
        output = self(prompts, 1, steps, sampler, seed=seed + UPSAMPLE_SEED, progress_bar=False, **inputs)
        return output.tensor


@dataclass(frozen=True)
class Cascade:
    """A base pipeline whose samples an upsampler enlarges; it is called like a pipeline."""

    base: MiniGlidePipeline
    upsampler: UpsamplerPipeline
    noise_level: int

    @property
    def name(self) -> str:
        return f"{self.base.name}_{self.upsampler.name}_{self.noise_level}"

    def __call__(
        self,
        prompts: Sequence[str],
        guidance_scale: float = 3.0,
        steps: int = 20,
        sampler: str | Sampler = "dpm++",
        seed: int = 0,
        **call_kwargs: Any,
    ) -> PipelineOutput:
        output = self.base(prompts, guidance_scale, steps, sampler, seed, **call_kwargs)
        images = self.upsampler.super_resolve(
            output.tensor, output.prompts, self.noise_level, steps, sampler, seed
        )
        return PipelineOutput(images, output.prompts)


def load_upsampler(
    checkpoint: str, noise_level: int, device: str, bases: Sequence[MiniGlidePipeline]
) -> UpsamplerPipeline:
    """Return the pipeline that --upsampler names, for samples of each of `bases`. Raises UserError."""
    upsampler = UpsamplerPipeline.from_pretrained(checkpoint, device)
    levels = num_noise_levels(upsampler.process)
    if not 0 <= noise_level < levels:
        raise UserError(f"--noise-level is {noise_level}; it was trained with levels from 0 to {levels - 1}")
    for base in bases:
        if (size := base.image_shape[-1]) != (low_res := upsampler.low_res):
            need = f"--upsampler enlarges {low_res}x{low_res} pixels"
            fitting = "tiny_small" if low_res == LOW_RES else "glide"
            raise UserError(f"{need}, and --checkpoint draws {size}x{size}; train --preset {fitting} for it")
    return upsampler
