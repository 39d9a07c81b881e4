"""What the studies on shapes share: their data, their metrics, and training a preset."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from common.images import to_pixels, to_tensor
from common.metrics import fid_between
from common.protocols import LossAtT, Model
from common.results.experiments import ExperimentConfig, train_variant
from lesson_05_cfg.guidance import Task, caption_loss, drop_captions
from lesson_06_miniglide.image_data.captioned_images import NUM_SHAPES, CaptionedImages, make_shapes
from lesson_06_miniglide.image_data.tokenizers import make_tokenizer
from lesson_06_miniglide.model import build_model, with_overrides, without_variance
from lesson_06_miniglide.networks.inpainting import expand_input_conv
from lesson_06_miniglide.networks.presets import LESSON, PRESETS
from lesson_06_miniglide.pipeline import MiniGlidePipeline, UpsamplerPipeline
from lesson_06_miniglide.scoring.features import pixels_8x8
from lesson_06_miniglide.scoring.shape_metrics import caption_metrics
from lesson_06_miniglide.training.config import Config as TrainConfig

BATCH_SIZE = 64  # half of the presets' batch: more steps in the same time
SAMPLING_STEPS = 50  # ancestral, because only ancestral sampling uses the learned variance
# Shown in figures; the last two have held-out pairs of colour and shape.
PROMPTS = ["a large red circle", "a blue square right of a white triangle", "three green triangles"]
PROMPTS += ["a small red triangle", "a blue circle above a yellow square"]
COLUMN_TITLES = {
    "n": "n",
    "caption_accuracy": "all of the caption correct",
    "single_accuracy": "single shapes correct",
    "count_accuracy": "counts correct",
    "pair_accuracy": "both shapes correct",
    "relation_accuracy": "relation correct, of these",
}


class ShapesData(NamedTuple):
    """Shapes to train on, and others to measure with."""

    tokenizer: Any  # of the training captions
    training: CaptionedImages
    validation: tuple[Tensor, ...]  # a batch
    captions: list[str]  # of images that are not in training
    real: Float[Tensor, "n 3 64 64"]  # these images


def load_shapes(config: ExperimentConfig, tokenizer: Any = None) -> ShapesData:
    """Render the training images, and config.num_samples others.

    tokenizer: of the model to start from; by default one is trained on the captions.
    """
    images = make_shapes(NUM_SHAPES)
    tokenizer = tokenizer or make_tokenizer(images.captions, PRESETS["tiny"].text)
    training, validation = images.tokenized(tokenizer).split(0.02)
    unseen = make_shapes(config.num_samples, seed=1)
    captions = unseen.captions_for(torch.arange(config.num_samples))
    return ShapesData(tokenizer, training, validation.first(256), captions, to_tensor(unseen.images))


def measure_captions(samples: Float[Tensor, "n 3 64 64"], captions: Sequence[str]) -> dict[str, Any]:
    """Return how many samples show what their captions say, in all and by kind of caption."""
    return {"n": len(samples)} | caption_metrics(to_pixels(samples), captions)


def fid_8x8(real: Float[Tensor, "n 3 64 64"], samples: Float[Tensor, "m 3 64 64"]) -> float:
    """Return the FID of samples in their colours at 8x8 pixels."""
    return fid_between(pixels_8x8(to_pixels(real)), pixels_8x8(to_pixels(samples)))


def train_preset(
    config: ExperimentConfig,
    shapes: ShapesData,
    variant: str,
    preset_name: str = "tiny",
    *,
    loss: LossAtT | None = None,
    caption_dropout: float = 0.2,
    task: Task | None = None,
    init_from: MiniGlidePipeline | None = None,
    steps: int | None = None,
    **changes: Any,
) -> MiniGlidePipeline:
    """Train a preset's network on shapes with the preset's recipe, and return its pipeline.

    variant: the name of the training run. loss, task: instead of the preset's own; with another loss than the
    preset's L_hybrid the network learns no variance. init_from: a model to start from; input channels that it
    does not have start at zero. steps: instead of config.steps. changes: of the preset's other fields.
    """
    preset = replace(PRESETS[preset_name], **changes)
    hybrid, _ = preset.losses
    network_config = preset.network if loss in (None, hybrid) else without_variance(preset.network)
    text_config = with_overrides(preset.text, vocab_size=shapes.tokenizer.vocab_size)
    torch.manual_seed(config.seed)
    network, diffusion, metadata = build_model(preset, network_config, text_config)
    if init_from:
        network.load_state_dict(expand_input_conv(init_from.network.state_dict(), network))
    metadata = dict(metadata) | {"tokenizer": shapes.tokenizer.to_json(), "prompts": PROMPTS}
    drop_fn = partial(drop_captions, probability=caption_dropout)
    network = train_variant(
        LESSON,
        config,
        variant,
        network,
        caption_loss(loss or hybrid, diffusion, drop_fn, task or preset.task, preset.sample_t),
        shapes.training,
        shapes.validation,
        config_class=TrainConfig,
        metadata=metadata,
        lr_scales=preset.lr_scales,
        preset=preset_name,
        optimizer=preset.optimizer,
        learning_rate=preset.learning_rate,
        batch_size=BATCH_SIZE,
        caption_dropout=caption_dropout,
        checkpoint_every=500,
        steps=steps or config.steps,
    )
    pipeline = UpsamplerPipeline if preset.upsample else MiniGlidePipeline
    return pipeline(Model(network, diffusion, metadata), shapes.tokenizer)
