"""Lesson 6: measure samples. FID and KID against any captioned images; kinds and breeds; shapes exactly.

    python lesson_06_miniglide/evaluate.py --checkpoint RUN --data-dir DOGS --dogs        photos of dogs
    python lesson_06_miniglide/evaluate.py --checkpoint RUN --data-dir SBU_MINI --kinds   photos of kinds
    python lesson_06_miniglide/evaluate.py --checkpoint RUN                               shapes
    python lesson_06_miniglide/evaluate.py --checkpoint SIMPLE --checkpoint HYBRID --data-dir COCO \\
        --num-samples 5000 --guidance-scale 3 --steps 100 --sampler ddpm --features inception

The last command makes the report's Table 3. Samples are kept in --out with their captions; an interrupted
evaluation continues from there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
import tyro
from jaxtyping import UInt8
from tyro.conf import arg

from common.cli import Bounds, GuidanceScale, PositiveInt, Seed, check_choice, flag_name, run_command
from common.device import describe_machine
from common.errors import UserError
from common.files import make_folder, write_json
from common.sampling import write_npz
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.pipeline import PipelineOutput
from lesson_06_miniglide.image_data.captioned_images import CaptionedImages, load_images, make_shapes
from lesson_06_miniglide.image_data.decoding import RESIZE_FILTER
from lesson_06_miniglide.pipeline import Cascade, MiniGlidePipeline, load_upsampler
from lesson_06_miniglide.scoring.features import EXTRACTORS, FeatureExtractor, fid_kid
from lesson_06_miniglide.scoring.kind_classifier import HELD_OUT
from lesson_06_miniglide.scoring.photo_metrics import breed_metrics, kind_metrics, memorization_rates
from lesson_06_miniglide.scoring.shape_metrics import caption_metrics, distance_to_renders

CHUNK_SIZE = 100  # samples per file
MIN_SAMPLES = 4  # real images are halved for the FID floor, and each half needs two
FORMER_NAMES = {"judge": "classifier"}  # of --features
# Titles of columns in tables (common/results/report.py); those of shapes are in studies/captioned_shapes.py.
COLUMN_TITLES = {
    "sampler": "sampler",
    "sample_steps": "steps",
    "caption_accuracy_held_out": ("all of the caption correct, held-out pairs", ".1%"),
    "read_as_dog": ("classified as a dog", ".1%"),
    "breed_accuracy": "breed correct",
    "kind_accuracy": ("classified as its kind", ".1%"),
    "kind_accuracy_real": ("held-out photos classified as their kind", ".1%"),
    "images_seen": "training images",
    "training_minutes": ("minutes", ".0f"),
    "memorised": ("memorized (real: 1 %)", ".1%"),
    "memorised_blurred": ("memorized, real and blurred", ".1%"),
}
SampleCount = Annotated[int, Bounds(MIN_SAMPLES, float("inf"), f"be at least {MIN_SAMPLES}")]


@dataclass(frozen=True)
class Config:
    """Lesson 6: measure the samples of one or several checkpoints."""

    # a run's folder or a .safetensors file; can be repeated; default: the pretrained weights
    checkpoint: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    data_dir: str | None = None  # real images to compare with, as in train.py; default: rendered shapes
    dogs: bool = False  # read --data-dir as Stanford Dogs, and measure the breeds of the samples
    # measure the kinds of things that captions name, for models trained with --validation-fraction 0.1
    kinds: bool = False
    # more images of the same kind that were not trained on, to measure memorization with
    validation_dir: Annotated[str | None, arg(aliases=["--held-back-dir"])] = None
    image_limit: PositiveInt | None = None  # number of real images, the first that are readable
    resize: str = "squish"  # squish (to a square) or crop (the middle)
    crop_to_box: bool = False  # compare with real images that are cropped as train.py --crop-to-box does
    cache_dir: str | None = None  # folder for the decoded images; default <data-dir>/.cache
    allow_broken: bool = False  # continue if more than 5 % of the images are broken
    num_samples: SampleCount = 1000  # their captions are evenly spaced over those of the real images
    guidance_scale: GuidanceScale = 3.0  # 0 ignores the caption, 1 is the plain model
    steps: PositiveInt = 20  # network evaluations per sample (with and without caption at once)
    sampler: str = "dpm++"  # ddpm, ddim or dpm++
    upsampler: str | None = None  # a checkpoint of --preset tiny_upsampler that enlarges the samples
    noise_level: int = 100  # timestep whose noise the upsampler's low-resolution images get
    # inception (needs torch-fidelity and a download), classifier (the dog classifier of this lesson) or kinds
    features: str = "classifier"
    flip: bool = True  # compare with mirrored images, too, when measuring memorization
    seed: Seed = 0  # of the noise
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str = "evaluation"  # folder for the samples and evaluation.json


@runtime_checkable
class Pipeline(Protocol):
    """What can be measured: a MiniGlidePipeline, a Cascade, or anything else that is called like them."""

    @property
    def name(self) -> str:
        """A short name of the weights, for the folder of the samples."""
        ...

    def __call__(
        self, prompts: Sequence[str], guidance_scale: float, steps: int, sampler: str, seed: int, /
    ) -> PipelineOutput: ...


def sample_cached(
    pipe: Pipeline, captions: Sequence[str], name: str, config: Config
) -> UInt8[np.ndarray, "n h w 3"]:
    """Return one sample per caption; those that an earlier call has written to --out are read from there.

    name: of the captions, for the folder of the samples. Raises UserError if that folder has samples of
    other captions.
    """
    settings = f"s{config.guidance_scale:g}_{config.sampler}_{config.steps}_seed{config.seed}"
    folder = Path(config.out) / f"{name}_{pipe.name}_{settings}_n{len(captions)}"
    make_folder(folder, "--out")
    chunks = []
    for start in range(0, len(captions), CHUNK_SIZE):
        prompts, path = captions[start : start + CHUNK_SIZE], folder / f"{start:06}.npz"
        if not path.exists():
            seed = config.seed * 1_000_003 + start  # other noise for every chunk
            output = pipe(prompts, config.guidance_scale, config.steps, config.sampler, seed)
            write_npz(path, output.tensor, prompts)
            print(f"{start + len(prompts)} of {len(captions)} samples", flush=True)
        with np.load(path) as chunk:
            if chunk["prompts"].tolist() != prompts:
                raise UserError(f"--out {folder} holds samples of other captions; name another folder")
            chunks.append(chunk["images"])
    return np.concatenate(chunks)


def evaluate_shapes(pipe: Pipeline, config: Config) -> dict[str, Any]:
    """Return the accuracies of samples for captions as in training and for captions with held-out pairs.

    FID and KID compare the samples for captions as in training with rendered images of these captions.
    """
    metrics: dict[str, Any] = {"n": config.num_samples}
    for name, held_out in (("shapes", False), ("shapes_held_out", True)):
        data = make_shapes(config.num_samples, seed=config.seed + 1, held_out=held_out)
        captions = data.captions_for(torch.arange(len(data)))
        samples = sample_cached(pipe, captions, name, config)
        metrics |= caption_metrics(samples, captions, "_held_out" if held_out else "")
        if not held_out:
            distances = distance_to_renders(samples, data.images, captions, config.seed + 2)
    return metrics | distances


def evaluate_photos(
    pipe: Pipeline, data: CaptionedImages, extract: FeatureExtractor, config: Config
) -> dict[str, Any]:
    """Return FID and KID of samples to `data`, and if the flags ask for them, breeds and memorization rates.

    Raises UserError if there are fewer than four images.
    """
    n = min(config.num_samples, len(data))
    if n < MIN_SAMPLES:
        raise UserError(f"--data-dir: {n} photos are too few to compare with; {MIN_SAMPLES} are needed")
    captions = data.captions_for(torch.linspace(0, len(data) - 1, n).long())
    samples = sample_cached(pipe, captions, data.name, config)
    metrics: dict[str, Any] = {"n": n} | fid_kid(samples, data.images, extract)
    if config.dogs:
        metrics |= breed_metrics(samples, captions)
    if config.validation_dir:
        train_images = data.images
        val_images = load_images(replace(config, data_dir=config.validation_dir)).images
        metrics |= memorization_rates(samples, train_images, val_images, config.flip)
    return metrics


def evaluate_kinds(
    pipe: Pipeline, data: CaptionedImages, extract: FeatureExtractor, config: Config
) -> dict[str, Any]:
    """Return the metrics of samples for the captions of held-out photos of `data`.

    FID and KID are to the photos that were trained on; their floor is that of the held-out photos.
    """
    photos, held_out = data.split(HELD_OUT)
    n = min(config.num_samples, len(held_out))
    captions = held_out.captions_for(torch.arange(n))
    samples = sample_cached(pipe, captions, data.name, config)
    train_images = data.images[photos.indices.numpy()]
    val_images = data.images[held_out.indices.numpy()]
    val_captions = held_out.captions_for(torch.arange(len(held_out)))
    metrics: dict[str, Any] = {"n": n} | kind_metrics(samples, captions, val_images, val_captions)
    metrics |= fid_kid(samples, train_images, extract, val_images[:n])
    return metrics | memorization_rates(samples, train_images, val_images, config.flip)


def training_facts(pipe: Pipeline) -> dict[str, Any]:
    """Return how large a model is and how long it was trained, as its checkpoint says."""
    if not isinstance(pipe, MiniGlidePipeline) or "step" not in pipe.metadata:
        return {}
    metadata, settings = pipe.metadata, pipe.metadata["config"]
    return {
        "parameter_count": sum(p.numel() for p in pipe.network.parameters()),
        "images_seen": metadata["step"] * settings["batch_size"] * settings["grad_accum"],
        "training_minutes": metadata["minutes"],
        "validation_loss": metadata.get("validation_loss"),
    }


def check_config(config: Config) -> None:
    """Raise UserError for flags that cannot work, before anything is loaded."""
    check_choice("--features", config.features, EXTRACTORS)
    check_choice("--sampler", config.sampler, SAMPLERS)
    for flag in ("dogs", "kinds", "validation_dir", "image_limit", "crop_to_box"):
        if getattr(config, flag) and not config.data_dir:
            raise UserError(f"{flag_name(flag)} needs --data-dir, the images to compare with")


def load_pipelines(config: Config) -> Sequence[Pipeline]:
    """Return one pipeline per checkpoint, each with the upsampler if there is one. Raises UserError."""
    bases = [MiniGlidePipeline.from_pretrained(c, config.device) for c in config.checkpoint or (None,)]
    if not config.upsampler:
        return bases
    upsampler = load_upsampler(config.upsampler, config.noise_level, config.device, bases)
    return [Cascade(base, upsampler, config.noise_level) for base in bases]


def settings_row(config: Config) -> dict[str, Any]:
    """Return the settings that evaluation.json lists with every checkpoint."""
    names = ["guidance_scale", "sampler", "seed"]
    names += ["upsampler", "noise_level"] if config.upsampler else []
    names += ["resize", *["crop_to_box"] * config.crop_to_box, "features"] if config.data_dir else []
    row = {name: getattr(config, name) for name in names} | {"sample_steps": config.steps}
    return row | ({"resize_filter": RESIZE_FILTER} if config.data_dir else {"features": "pixels_8x8"})


def main(config: Config) -> None:
    features = "kinds" if config.kinds else FORMER_NAMES.get(config.features, config.features)
    config = replace(config, features=features)
    check_config(config)
    extract = EXTRACTORS[config.features]() if config.data_dir else None
    pipes = load_pipelines(config)
    data = load_images(config) if config.data_dir else None
    make_folder(config.out, "--out")
    rows = []
    for checkpoint, pipe in zip(config.checkpoint or ("pretrained",), pipes):
        if data and extract:
            measure = evaluate_kinds if config.kinds else evaluate_photos
            metrics = training_facts(pipe) | measure(pipe, data, extract, config)
        else:
            metrics = evaluate_shapes(pipe, config)
        rows.append({"checkpoint": checkpoint, **settings_row(config), **metrics})
        print("  ".join(f"{name} {value}" for name, value in rows[-1].items()))
    content = {"rows": rows, "machine": describe_machine(config.device)}
    write_json(Path(config.out) / "evaluation.json", content)


if __name__ == "__main__":
    run_command(main, Config)
