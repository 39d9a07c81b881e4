"""What the page of demo.py computes: samples from a checkpoint of any lesson, step by step."""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image
from torch import Tensor

from common.cli import check_choice
from common.device import autocast, pick_device
from common.errors import UserError
from common.images import to_uint8
from common.plotting import image_grid
from common.protocols import Denoiser, Metadata, Model, NoiseStreams
from common.sampling import initial_noise
from common.training.checkpoints import load_model, pretrained_path
from lesson_01_ddpm import model as lesson_1
from lesson_01_ddpm.diffusion import clamp_x_0
from lesson_02_improved_ddpm import model as lesson_2
from lesson_03_adm import model as lesson_3
from lesson_04_text_conditioning import model as lesson_4
from lesson_05_cfg import pipeline as lesson_5
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import dynamic_threshold
from lesson_06_miniglide import model as lesson_6
from lesson_06_miniglide.editing.inpaint_inputs import (
    InpaintInputs,
    InpaintSampler,
    downsample_mask,
    resize_square,
)
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.pipeline import MiniGlidePipeline

# Limits of one request
MAX_STEPS, MAX_SAMPLES, MAX_PROMPT, MAX_SIDE, MAX_SCALE, MAX_SEED = 250, 16, 300, 4096, 20, 2**31 - 1
FRAMES = 25  # of the animation
NUM_RESAMPLES = 5  # of RePaint, for networks that were not trained to inpaint
DISPLAY_SIDE = 512  # pixels on the page
BUILDERS = {
    lesson_1.LESSON: lesson_1.build_from_metadata,
    lesson_2.LESSON: lesson_2.build_from_metadata,
    lesson_3.LESSON: lesson_3.build_from_metadata,
    lesson_4.LESSON: lesson_4.build_from_metadata,
    lesson_5.LESSON: lesson_4.build_from_metadata,
    LESSON: lesson_6.build_from_metadata,
}
Frame = UInt8[np.ndarray, "height width 3"]


def build_from_metadata(metadata: Metadata) -> Model:
    """Return the untrained model of any lesson's checkpoint. Raises UserError if it does not draw images."""
    model = BUILDERS[metadata["lesson"]](metadata)
    if metadata["lesson"] == LESSON and lesson_6.unwrap(model.network).upsample:
        raise UserError("--checkpoint is an upsampler; the page needs a network that draws images by itself")
    return model


class DemoModel:
    """A checkpoint of any lesson, by default lesson 5's pretrained weights.

    Raises UserError if it cannot be loaded or does not draw images.
    """

    def __init__(self, checkpoint: str | Path | None = None, device: str = "auto"):
        checkpoint = checkpoint or pretrained_path(lesson_5.LESSON)
        model = load_model(checkpoint, None, build_from_metadata, device)
        self.network, self.process, self.metadata = model
        self.lesson, self.device = self.metadata["lesson"], pick_device(device)
        self.max_steps = min(MAX_STEPS, self.process.num_timesteps)
        self.image_shape = getattr(self.network, "image_shape", lesson_1.IMAGE_SHAPE)
        self.pipe: MiniGlidePipeline | None = None  # of a network that reads captions
        if "text" in self.metadata:
            self.pipe = MiniGlidePipeline(model, MiniGlidePipeline.load_tokenizer(self.metadata))

    def make_denoiser(self, prompt: str, n: int, guidance_scale: float, **unet_kwargs: Tensor) -> Denoiser:
        """Return the denoiser for n samples of a prompt.

        Lesson 3's prompt is a digit; lessons 1 and 2 ignore it. Raises UserError for other prompts.
        """
        denoiser: Denoiser = self.network
        if self.pipe:
            make_denoiser = self.pipe.make_denoiser([prompt] * n, guidance_scale, None, **unet_kwargs)
            denoiser = make_denoiser(torch.arange(n))
        elif self.lesson == lesson_3.LESSON:
            if not (len(prompt) == 1 and prompt in "0123456789"):
                raise UserError("This network draws one digit; enter 0 to 9 as the prompt.")
            denoiser = lesson_3.class_denoiser(self.network, torch.full((n,), int(prompt)))(torch.arange(n))

        def autocast_denoiser(x_t: Tensor, t: Tensor) -> Tensor:
            with autocast(self.device):
                return denoiser(x_t, t)

        return autocast_denoiser


def sample_frames(
    model: DemoModel,
    prompt: str | None,
    guidance_scale: Any,
    steps: Any,
    sampler: str,
    thresholding: bool,
    seed: Any,
    n: Any,
    drawing: Mapping[str, Any] | None = None,
) -> Iterator[tuple[Frame, Frame]]:
    """Yield grids of x_t and of the predicted x_0 while sampling, at last the samples as both.

    Arguments are what the fields of the page contain. drawing: of gradio's ImageEditor. Raises UserError with
    a message for the page before the first grid.
    """
    try:
        guidance_scale, steps, n, seed = float(guidance_scale), int(steps), int(n), int(seed)
    except (TypeError, ValueError, OverflowError):
        message = "A field is empty; guidance scale, steps, seed and number of samples must be numbers."
        raise UserError(message) from None
    prompt = (prompt or "").strip()
    check_request(model, prompt, guidance_scale, steps, sampler, seed, n)
    denoised_fn = dynamic_threshold if thresholding else clamp_x_0
    sample: InpaintSampler = SAMPLERS[sampler]
    sample = partial(sample, denoised_fn=denoised_fn)
    unet_kwargs: dict[str, Tensor] = {}
    if inpaint := inpaint_inputs(drawing, model.image_shape):
        sample, unet_kwargs = inpaint.make_sampler(model.network, sample, n, NUM_RESAMPLES, denoised_fn)
    first_noise, generator = torch.Generator().manual_seed(seed), NoiseStreams(seed, range(n))
    x_T = initial_noise(n, model.image_shape, first_noise).to(model.device)
    denoiser = model.make_denoiser(prompt, n, guidance_scale, **unet_kwargs)
    every = -(-steps // FRAMES)
    for i, step in enumerate(sample(model.process.respace_evenly(steps), denoiser, x_T, generator)):
        if i % every == 0:
            yield to_frame(step.x_t), to_frame(step.x_0)
    yield to_frame(step.x_prev), to_frame(step.x_prev)


def check_request(
    model: DemoModel, prompt: str, guidance_scale: float, steps: int, sampler: str, seed: int, n: int
) -> None:
    """Raise UserError for values out of range, which only a program can send."""
    if len(prompt) > MAX_PROMPT:
        raise UserError(f"The prompt has {len(prompt)} characters; at most {MAX_PROMPT} are allowed.")
    if model.pipe and not prompt:
        raise UserError("Enter a prompt.")
    if not 0 <= guidance_scale <= MAX_SCALE:
        raise UserError(f"The guidance scale must be between 0 and {MAX_SCALE}.")
    if not 2 <= steps <= model.max_steps:
        raise UserError(f"The number of steps must be between 2 and {model.max_steps}.")
    if not 1 <= n <= MAX_SAMPLES:
        raise UserError(f"The number of samples must be between 1 and {MAX_SAMPLES}.")
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"The seed must be between 0 and {MAX_SEED}.")
    check_choice("The sampler", sampler, SAMPLERS)


def inpaint_inputs(
    drawing: Mapping[str, Any] | None, image_shape: tuple[int, int, int]
) -> InpaintInputs | None:
    """Return the image and mask of a drawing; None if there is no image, or nothing is painted over it.

    drawing: {"background": uint8 [H, W, 3 or 4], "layers": [uint8 [H, W, 4]]}; a pixel is painted where a
    layer's alpha channel is not 0. Raises UserError if the image is too large.
    """
    if not drawing or drawing.get("background") is None:
        return None
    background, (channels, size, _) = drawing["background"], image_shape
    if max(background.shape[:2]) > MAX_SIDE:
        raise UserError(f"The image has more than {MAX_SIDE} pixels per side.")
    painted = np.zeros(background.shape[:2], bool)
    for layer in drawing.get("layers") or []:
        painted |= layer[..., 3] > 0
    if not painted.any():
        return None
    keep_mask = torch.from_numpy(~downsample_mask(painted, size)).float()[None, None]
    return InpaintInputs(resize_square(Image.fromarray(background), size, channels), keep_mask)


def to_frame(images: Float[Tensor, "n c h w"]) -> Frame:
    """Return images in [-1, 1] as a grid that is large enough for the page."""
    columns = -(-len(images) // max(1, int(len(images) ** 0.5)))
    grid = image_grid(to_uint8(images.cpu()), columns, padding=1).permute(1, 2, 0).numpy()
    factor = max(1, DISPLAY_SIDE // max(grid.shape))
    return grid.repeat(factor, 0).repeat(factor, 1)
