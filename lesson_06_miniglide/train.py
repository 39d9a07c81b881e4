"""Lesson 6: train miniGLIDE (any captioned images), dogGLIDE (--dogs), or a model of rendered shapes.

python lesson_06_miniglide/train.py --data-dir ../shared/data/stanford_dogs_mini --dogs --time-limit 90

To fine-tune the published GLIDE on photos:

python lesson_06_miniglide/train.py --preset glide --init-from base.pt --vocabulary GPT2 --data-dir DOGS \\
    --train text --learning-rate 1e-5 --batch-size 1 --grad-accum 8 --activation-checkpointing
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.cli import run_command
from common.device import check_compiler
from common.errors import UserError
from common.plotting import plot_grid
from common.protocols import Model
from common.training.checkpoints import (
    find_training_state,
    load_state,
    load_training_state,
    load_weights,
    results_dir,
)
from common.training.run_dir import Recorder, RunDir, saved_config
from lesson_05_cfg.guidance import caption_loss, drop_captions
from lesson_06_miniglide.image_data.captioned_images import HUB_CACHES, CaptionedImages, load_images
from lesson_06_miniglide.image_data.tokenizers import GPT2_VOCABULARY, make_tokenizer
from lesson_06_miniglide.model import build_model, resolve_configs, set_trainable, unwrap
from lesson_06_miniglide.networks import openai_glide
from lesson_06_miniglide.networks.frozen_t5 import CachedTextEncoder, FrozenEncoder
from lesson_06_miniglide.networks.inpainting import expand_input_conv
from lesson_06_miniglide.networks.openai_glide import is_openai_file
from lesson_06_miniglide.networks.presets import LESSON, PRESETS
from lesson_06_miniglide.networks.upsampler import preview_low_res
from lesson_06_miniglide.pipeline import MiniGlidePipeline
from lesson_06_miniglide.training.config import Config, resolved
from lesson_06_miniglide.training.distributed import DDPTrainer, init_distributed, local_main_first

PREVIEW_SCALES = (1, 3, 6)  # guidance scales of the previews during training


def earlier_weights(config: Config) -> tuple[dict[str, Tensor] | None, dict[str, Any] | None]:
    """Return weights and metadata of the run to resume or to start from; (None, None) for a new one.

    OpenAI's files have weights but no metadata.
    """
    if config.resume:
        return load_weights(
            find_training_state(config.resume).with_suffix(".safetensors"), LESSON, "--resume"
        )
    if not config.init_from:
        return None, None
    if is_openai_file(config.init_from):
        return openai_glide.load_weights(config.init_from, "--init-from"), None
    weights, metadata = load_weights(config.init_from, LESSON, "--init-from")
    if "network" not in metadata:
        raise UserError(f"--init-from {config.init_from} is not a text-to-image network")
    return weights, metadata


def choose_tokenizer(
    config: Config, images: CaptionedImages, text_config: Any, metadata: dict[str, Any] | None
) -> Any:
    """Return what turns captions into the text encoder's inputs: a tokenizer or a frozen encoder."""
    if metadata:
        return MiniGlidePipeline.load_tokenizer(metadata)
    if config.text_encoder:
        return FrozenEncoder(config.text_encoder, text_config.context_length)
    return make_tokenizer(images.captions, text_config, config.vocabulary)


def start_from(network: nn.Module, weights: dict[str, Tensor], metadata: Any, flag: str) -> None:
    """Load weights to start from. Raises UserError, naming the flag, if they do not fit.

    OpenAI's, which have no metadata, belong inside the wrappers: its upsampler is not told a noise level. Our
    wrapper starts by ignoring the level.
    """
    if metadata:
        load_state(network, expand_input_conv(weights, network), flag)
    else:
        load_state(unwrap(network), weights, flag)


def with_cache(config: Config, encoder: FrozenEncoder) -> Any:
    """Keep a frozen encoder's states next to the decoded images; those of shapes are not kept."""
    folder = config.cache_dir or (Path(config.data_dir) / ".cache" if config.data_dir else None)
    folder = folder or (HUB_CACHES if config.dataset_name else None)
    return CachedTextEncoder(encoder, folder) if folder else encoder


def reference_csv(config: Config) -> Path | None:
    """Return metrics.csv of the pretrained run whose loss is comparable with this one's, if there is one."""
    own_images = (config.data_dir or config.dataset_name) and not config.dogs
    if config.preset != "tiny" or config.no_vlb or own_images:
        return None
    return results_dir(LESSON, "dogs" if config.dogs else None) / "metrics.csv"


def make_preview(
    model: Model, tokenizer: Any, config: Config, images: CaptionedImages, validation: CaptionedImages
) -> tuple[list[str], Callable[[nn.Module], Figure]]:
    """Return the captions of the previews, and averaged network -> figure with one row per guidance scale.

    A network that sees an image besides x_t is shown some validation images and draws their captions.
    """
    count = len(config.preview_prompt) or 6
    examples = validation if len(validation) >= count else images
    example, inputs = PRESETS[config.preset].task(model.process, model.network, examples.first(count)[0])
    default_prompts = examples.captions_for(torch.arange(len(example))) if inputs else images.most_frequent(6)
    prompts = list(config.preview_prompt) or default_prompts

    def preview(network: nn.Module) -> Figure:
        pipe = MiniGlidePipeline(Model(network, model.process, model.metadata), tokenizer)
        steps = config.dry_run_cap(min(20, config.timesteps))
        rows = {
            f"s = {s}": pipe(prompts, s, steps, seed=config.seed, progress_bar=False, **inputs).tensor
            for s in PREVIEW_SCALES
        }
        if "low_res" in inputs:
            seen = preview_low_res(inputs["low_res"], inputs["noise_level"], example.shape[-1])
            rows = {"input": seen, **rows, "original": example}
        if "inpaint_image" in inputs:
            rows = {"input": inputs["inpaint_image"] * inputs["inpaint_mask"], **rows, "original": example}
        grid = torch.cat(list(rows.values()))
        return plot_grid(grid, len(prompts), row_labels=list(rows), column_labels=prompts)

    return prompts, preview


def run(config: Config, images: CaptionedImages, rank: int = 0, world: int = 1) -> nn.Module:
    """Train on `images` and return the averaged network. Raises UserError.

    config: as `resolved` returns it. rank, world: of this process, as `init_distributed` returns them.
    """
    preset = PRESETS[config.preset]
    text_config: Any  # TextConfig or T5Config
    network_config, text_config = resolve_configs(config)
    earlier, earlier_metadata = earlier_weights(config)
    tokenizer = choose_tokenizer(config, images, text_config, earlier_metadata)
    if isinstance(tokenizer, FrozenEncoder):
        text_config, encoder = tokenizer.config(text_config.width), with_cache(config, tokenizer)
    else:
        vocab_size = GPT2_VOCABULARY if config.vocabulary else tokenizer.vocab_size
        text_config, encoder = replace(text_config, vocab_size=vocab_size), tokenizer
    photos = images
    images, validation_images = local_main_first(images.tokenized, encoder).split(config.validation_fraction)

    torch.manual_seed(config.seed)
    model = build_model(config.preset, network_config, text_config, config.timesteps)
    network, diffusion, metadata = model
    if earlier and not config.resume:
        start_from(network, earlier, earlier_metadata, f"--init-from {config.init_from}")
    del earlier  # of the published network, more than a gigabyte
    set_trainable(network, config.train)
    prompts, preview = make_preview(model, tokenizer, config, images, validation_images)
    metadata = dict(metadata) | {"prompts": prompts}
    if not isinstance(tokenizer, FrozenEncoder):
        metadata["tokenizer"] = tokenizer.to_json()

    hybrid, simple = preset.losses
    drop_fn = partial(drop_captions, probability=config.caption_dropout)
    loss = caption_loss(simple if config.no_vlb else hybrid, diffusion, drop_fn, preset.task, preset.sample_t)
    if config.epochs:
        assert config.batch_size, "call `resolved` first"
        epoch = len(images) / (config.batch_size * config.grad_accum * world)
        steps = math.ceil(config.epochs * epoch)
        config = replace(config, steps=min(steps, config.steps or steps))

    run_dir, state, callbacks = None, None, []
    if rank == 0:
        name = f"{images.name}, {len(images)} images"
        run_dir = RunDir(LESSON, config, name, keep_last=3 if config.delcheck else None)
        run_dir.reference_csv, state = reference_csv(config), run_dir.state
        callbacks = [Recorder(run_dir, metadata, preview, preview_every=config.sample_every, data=photos)]
    elif config.resume:
        state = load_training_state(find_training_state(config.resume))
    validation = validation_images.first(256) if len(validation_images) else None
    trainer = DDPTrainer(
        network,
        loss,
        images,
        config,
        validation=validation,
        lr_scales=preset.lr_scales,
        state=state,
        callbacks=callbacks,
        rank=rank,
        world=world,
    )
    network = trainer.fit()
    if run_dir:
        metrics = {
            "steps": trainer.step,
            "images": len(images),
            "captions_cut": images.num_truncated,
            "best_validation_loss": trainer.best_validation_loss if validation else None,
        }
        run_dir.finish(metrics, "samples.png", preview(network))
    return network


def main(config: Config) -> None:
    config = resolved(config)
    resolve_configs(config)
    if config.compile:
        check_compiler(config.device)
    rank, world = init_distributed(config.device)
    images = local_main_first(load_images, config, PRESETS[config.preset].data_size)
    run(config, images, rank, world)


if __name__ == "__main__":
    run_command(main, Config, saved_config)
