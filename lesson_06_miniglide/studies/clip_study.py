"""What CLIP reads in noisy images of digits and of shapes, measured by retrieval. Run by experiments.py."""

from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.digits.captions import CAPTIONS, NUM_PHRASINGS, CaptionedDigits
from common.images import to_pixels
from common.plotting import plot_curves
from common.results.experiments import (
    ExperimentConfig,
    open_table,
    save_figure,
    train_variant,
    with_default_steps,
)
from common.training.checkpoints import pretrained_path
from common.training.config import TrainConfig
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.studies.captioned_digits import Study, open_study, train_captioned
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_06_miniglide import model as lesson_6
from lesson_06_miniglide.networks import noisy_clip
from lesson_06_miniglide.networks.noisy_clip import (
    CLIP_64_CONFIG,
    LR_SCALES,
    NoisyCLIP,
    build_clip,
    embed_captions,
    loss_clip,
    nearest_caption,
)
from lesson_06_miniglide.networks.presets import LESSON, PRESETS
from lesson_06_miniglide.shapes.checker import caption_accuracy
from lesson_06_miniglide.shapes.scenes import parse
from lesson_06_miniglide.studies.captioned_shapes import ShapesData, load_shapes

LEARNING_RATE = 1.5e-3
TIMESTEPS = (0, 200, 400, 600, 700, 800, 900, 999)  # whose noise CLIP reads through
NUM_CAPTIONS = 60  # among which it finds the image's
OPPOSITES = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
COLUMN_TITLES = {
    "clip": "CLIP",
    "t": "t",
    "num_captions": "captions to choose from",
    "retrieval_accuracy": "caption found",
    "swap_detection_rate": "opposite relation rejected",
}


def train_digits_clip(study: Study, variant: str, lr_scales: Mapping[str, float] = LR_SCALES) -> NoisyCLIP:
    """Train a CLIP on captioned digits. Experiments share these runs, so a finished one is only loaded."""
    torch.manual_seed(study.config.seed)
    clip = train_captioned(
        study,
        variant,
        build_clip(study.tokenizer),
        partial(loss_clip, make_diffusion()),
        group="clip",
        config_class=TrainConfig,
        metadata=tokenizer_metadata(study.tokenizer),
        lr_scales=dict(lr_scales),
        batch_size=32,
        learning_rate=LEARNING_RATE,
    )
    return cast(NoisyCLIP, clip)


def train_shapes_clip(
    config: ExperimentConfig, shapes: ShapesData, diffusion: GaussianDiffusion
) -> NoisyCLIP:
    """Train a CLIP on shapes. Experiments share this run, so a finished one is only loaded."""
    torch.manual_seed(config.seed)
    clip = train_variant(
        LESSON,
        config,
        "clip",
        build_clip(shapes.tokenizer, CLIP_64_CONFIG),
        partial(loss_clip, diffusion),
        shapes.training,
        shapes.validation,
        group="clip_of_shapes",
        metadata=tokenizer_metadata(shapes.tokenizer),
        lr_scales=LR_SCALES,
        batch_size=64,
        learning_rate=LEARNING_RATE,
    )
    return cast(NoisyCLIP, clip)


def tokenizer_metadata(tokenizer: CaptionTokenizer) -> dict[str, Any]:
    """Return what a checkpoint needs, so that `tokenizer_from_metadata` finds its tokenizer."""
    return {"tokenizer": tokenizer.to_json(), "text": {"context_length": tokenizer.context_length}}


def load_clip(name: str = "clip") -> tuple[NoisyCLIP, CaptionTokenizer]:
    """Return a pretrained CLIP, frozen, and its tokenizer: "clip" of digits, or "clip_of_shapes"."""
    return noisy_clip.load_clip(pretrained_path(LESSON, name))


def retrieval(config: ExperimentConfig) -> None:
    """Measure how often CLIP finds an image's caption at several noise levels, on digits.

    It chooses among one caption for each pair of digit and colour that training shows.
    """
    config, diffusion = with_default_steps(config), make_diffusion()
    study = open_study(LESSON, config)
    clips = {"text at 3 % of the rate": train_digits_clip(study, "clip")}
    clips["text at the full rate"] = train_digits_clip(study, "full_rate", lr_scales={})
    digits = CaptionedDigits(study.splits[1], colour_prob=1.0)
    torch.manual_seed(config.seed)
    x_0, captions = digits.batch(torch.arange(min(config.num_samples, len(digits))))
    first_phrasings = captions // NUM_PHRASINGS * NUM_PHRASINGS  # it stands for all phrasings of a pair
    distinct, correct = first_phrasings.unique(return_inverse=True)
    texts = [CAPTIONS[i] for i in distinct.tolist()]

    def measure(clip: NoisyCLIP, t: int) -> dict[str, Any]:
        torch.manual_seed(config.seed)
        embeddings = embed_captions(clip, study.tokenizer, texts)
        nearest = nearest_caption(diffusion, clip, x_0.to(embeddings.device), embeddings, t).cpu()
        accuracy = (nearest == correct).float().mean().item()
        return {"n": len(x_0), "num_captions": len(texts), "retrieval_accuracy": accuracy}

    curves = {}
    for name, clip in clips.items():
        rows = [study.table.row(partial(measure, clip, t), clip=name, t=t) for t in TIMESTEPS]
        curves[name] = [(row["t"], row["retrieval_accuracy"]) for row in rows]
    save_figure(study.table, plot_curves(curves, "t", "captions found", logarithmic=False))


def swap_relation(caption: str) -> str:
    """Return a caption of two shapes with the opposite relation."""
    relation = parse(caption).relation
    assert relation
    return caption.replace(relation, OPPOSITES[relation])


def retrieval_of_shapes(config: ExperimentConfig) -> None:
    """Measure how often CLIP finds an image's caption at several noise levels, on shapes.

    It chooses among the captions of sixty images; any that is true of the image is correct. Then it chooses
    between an image's caption and the same with the opposite relation.
    """
    config = with_default_steps(config)
    table, shapes = open_table(LESSON, config), load_shapes(config)
    diffusion = lesson_6.make_diffusion(PRESETS["tiny"])
    clip = train_shapes_clip(config, shapes, diffusion)
    captions, pixels = shapes.captions, to_pixels(shapes.real)
    pairs = [i for i, caption in enumerate(captions) if parse(caption).relation]
    embeddings = embed_captions(clip, shapes.tokenizer, captions)
    opposites = embed_captions(clip, shapes.tokenizer, [swap_relation(captions[i]) for i in pairs])

    def nearest(indices: Int[Tensor, "n"], candidates: Float[Tensor, "k width"], t: int) -> list[int]:
        images = shapes.real[indices].to(candidates.device)
        return nearest_caption(diffusion, clip, images, candidates, t).tolist()

    def measure(t: int) -> dict[str, Any]:
        torch.manual_seed(config.seed)
        found = preferred = 0.0
        for indices in torch.arange(len(captions)).split(NUM_CAPTIONS):
            chosen = [captions[indices[k]] for k in nearest(indices, embeddings[indices], t)]
            found += caption_accuracy(pixels[indices.numpy()], chosen) * len(indices)
        for i, opposite in zip(pairs, opposites):
            preferred += nearest(torch.tensor([i]), torch.stack([embeddings[i], opposite]), t) == [0]
        row = {"n": len(captions), "num_captions": NUM_CAPTIONS, "retrieval_accuracy": found / len(captions)}
        return row | {"swap_detection_rate": preferred / max(1, len(pairs))}

    rows = [table.row(partial(measure, t), t=t) for t in TIMESTEPS]
    curves = {f"found among {NUM_CAPTIONS}": [(row["t"], row["retrieval_accuracy"]) for row in rows]}
    curves["relation, not its opposite"] = [(row["t"], row["swap_detection_rate"]) for row in rows]
    save_figure(table, plot_curves(curves, "t", "captions found", logarithmic=False))
