"""Lesson 6: sample 64x64 images from captions; enlarge them, inpaint an image, or start from one.

python lesson_06_miniglide/sample.py --checkpoint runs/lesson_06_miniglide/... --prompt "golden retriever"
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor
from tyro.conf import arg

from common.cli import Bounds, GuidanceScale, PositiveInt, flag_name, run_command
from common.errors import UserError
from common.sampling import respace_sampler, write_images
from common.training.checkpoints import pretrained_path
from lesson_04_text_conditioning.prompts import PromptConfig, grid_layout, warn_truncated
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_05_cfg.sample_prompts import check_sampling_flags, sample_prompts
from lesson_06_miniglide.editing.inpaint_inputs import (
    InpaintInputs,
    is_trained_to_inpaint,
    read_image,
    resize_square,
)
from lesson_06_miniglide.editing.samplers import image_to_image
from lesson_06_miniglide.networks import openai_glide
from lesson_06_miniglide.networks.noisy_clip import best_of, clip_similarity, load_clip
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.pipeline import MiniGlidePipeline, load_upsampler

Strength = Annotated[float, Bounds(0, 1, "be greater than 0 and at most 1", open_low=True)]

STEPS_HELP = (
    "network evaluations per sample (with and without caption at once); default 20, with --openai 100"
)
SAMPLER_HELP = "ddpm (ancestral), ddim or dpm++ (DPM-Solver++(2M)); default dpm++, with --openai ddpm"


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 6: sample 64x64 images from captions, with classifier-free guidance."""

    # 0 ignores the caption, 1 is the plain model, more follows it more closely; default 3, with --mask 5
    guidance_scale: GuidanceScale | None = None
    steps: Annotated[PositiveInt | None, arg(help=STEPS_HELP)] = None  # type: ignore[assignment]
    sampler: Annotated[str | None, arg(help=SAMPLER_HELP)] = None  # type: ignore[assignment]

    upsampler: str | None = None  # a checkpoint of --preset tiny_upsampler, to enlarge 16x16 samples
    noise_level: int = 100  # timestep of the noise that --upsampler sees its input with; 0 is almost none
    image: str | None = None  # an image to start from, or to inpaint with --mask
    mask: str | None = None  # an image: white where --image is replaced, black where it is kept
    strength: Strength = 0.7  # how much noise --image gets before sampling; 1 keeps nothing of it
    # repetitions of each step with --mask, if the network was not trained to inpaint; it then uses RePaint's
    # ancestral sampling, whatever --sampler says
    num_resamples: Annotated[PositiveInt, arg(aliases=["--times"])] = 5

    openai: str | None = None  # the published GLIDE in place of --checkpoint: base.pt, or base_inpaint.pt
    # the published 64x64 to 256x256 upsampler, for any network: upsample.pt, or upsample_inpaint.pt
    openai_upsampler: str | None = None
    vocabulary: str | None = None  # for --openai...: a folder with GPT-2's encoder.json and vocab.bpe

    # samples per prompt in place of --num-samples, of which the --keep most similar to it are written
    candidates: PositiveInt | None = None
    keep: PositiveInt = 1  # of --candidates, best first
    # the CLIP of this lesson that ranks --candidates; default: the pretrained one, of shapes
    clip: str | None = None


# With the first flag, the others have no effect.
NO_EFFECT = {
    "openai": {"upsampler", "noise_level", "strength", "num_resamples"},
    "mask": {"strength", "upsampler"},
    "candidates": {"num_samples"},
}
# The first flag needs one of the others.
NEEDS = {
    "openai": {"vocabulary"},
    "openai_upsampler": {"vocabulary"},
    "vocabulary": {"openai", "openai_upsampler"},
    "noise_level": {"upsampler"},
    "strength": {"image"},
    "mask": {"image"},
    "num_resamples": {"mask"},
    "keep": {"candidates"},
    "clip": {"candidates"},
}
# With any of these, there is more to do than to sample from --checkpoint.
EXTRAS = ("openai", "openai_upsampler", "upsampler", "image", "candidates")


def main(given: Config) -> None:
    check_combinations(given)
    config = with_defaults(given)
    check_sampling_flags(config)
    base = load_base(config)
    if not any(getattr(config, flag) for flag in EXTRAS):
        sample_prompts(config, base)
        return
    if config.upsampler:
        upsampler = load_upsampler(config.upsampler, config.noise_level, config.device, [base])
    if config.openai_upsampler:
        openai_upsampler = load_openai_upsampler(config, base)
    if config.candidates:
        size = upsampler.image_shape[-1] if config.upsampler else base.image_shape[-1]
        similarity = load_similarity(config, base, size)
    prompts = config.prompts(base.metadata["prompts"])
    warn_truncated(base.tokenizer, prompts)
    sampler, unet_kwargs = choose_sampler(config, base, len(prompts))
    settings = {"steps": config.steps, "seed": config.seed}
    images = base(prompts, config.guidance_scale, sampler=sampler, **settings, **unet_kwargs).tensor
    if config.upsampler:
        images = upsampler.super_resolve(
            images, prompts, config.noise_level, sampler=config.sampler, **settings
        )
    if config.candidates:
        images, prompts = keep_best(config, images, prompts, similarity(images, prompts))
    if config.openai_upsampler:
        inpaint = load_inpaint_inputs(config, openai_upsampler)
        images = openai_glide.super_resolve(openai_upsampler, images, prompts, config.seed, inpaint)
    write_images(Path(config.out), images, prompts, **grid_layout(prompts))
    print(f"{len(prompts)} samples, {config.steps} steps: {config.out}")


def check_combinations(config: Config) -> None:
    """Refuse flags that contradict each other or would have no effect. Raises UserError."""
    given = {field.name for field in fields(Config) if getattr(config, field.name) != field.default}
    for other, without_effect in NO_EFFECT.items():
        if other in given and (unused := sorted(without_effect & given)):
            raise UserError(f"{flag_name(unused[0])} has no effect with {flag_name(other)}; leave it out")
    if config.openai and config.checkpoint:
        raise UserError("--openai and --checkpoint name two networks; leave one out")
    for flag, needed in NEEDS.items():
        if flag in given and not needed & given:
            raise UserError(f"{flag_name(flag)} needs {' or '.join(map(flag_name, sorted(needed)))}")
    if config.openai and config.image and not config.mask:
        raise UserError("--image with --openai needs --mask, an image that is white where to inpaint")
    if config.openai_upsampler and config.mask and not config.openai:
        raise UserError("--openai-upsampler with --mask needs --openai base_inpaint.pt; or leave out --mask")
    if config.candidates and config.keep > config.candidates:
        raise UserError(
            f"--keep is {config.keep}; of --candidates {config.candidates} so many cannot be kept"
        )
    if config.out.endswith(".gif") and (extras := [name for name in EXTRAS if getattr(config, name)]):
        raise UserError(f"--out {config.out}: with {flag_name(extras[0])} name a .png, an .npz or a folder")


def with_defaults(config: Config) -> Any:
    """Return the configuration with the defaults that depend on other flags filled in."""
    steps, sampler = (100, "ddpm") if config.openai else (20, "dpm++")
    scale = config.guidance_scale
    if scale is None:
        scale = 5.0 if config.mask else 3.0
    config = replace(config, num_samples=config.candidates or config.num_samples)
    return replace(
        config, steps=config.steps or steps, sampler=config.sampler or sampler, guidance_scale=scale
    )


def load_base(config: Any) -> Any:
    """Return the pipeline of --checkpoint or --openai. Raises UserError."""
    if not config.openai:
        return MiniGlidePipeline.from_pretrained(config.checkpoint, config.device)
    # refuse wrong steps before a gigabyte is loaded
    respace_sampler(SAMPLERS[config.sampler], openai_glide.BaseProcess(), config.steps)
    base = openai_glide.load_base(config.openai, config.vocabulary, config.device)
    if config.mask and not is_trained_to_inpaint(base.network):
        raise UserError(f"--openai {config.openai} cannot inpaint; name the published base_inpaint.pt")
    return base


def load_openai_upsampler(config: Any, base: TextToImagePipeline) -> TextToImagePipeline:
    """Return the pipeline of --openai-upsampler, for samples of `base`. Raises UserError."""
    path, size = config.openai_upsampler, base.image_shape[-1]
    if size != openai_glide.BASE["image_size"] and not config.upsampler:
        raise UserError(f"--openai-upsampler enlarges 64x64 pixels, and --checkpoint draws {size}x{size}")
    upsampler = openai_glide.load_upsampler(path, config.vocabulary, config.device)
    if config.mask and not is_trained_to_inpaint(upsampler.network):
        raise UserError(f"--openai-upsampler {path} cannot inpaint; name the published upsample_inpaint.pt")
    return upsampler


def load_similarity(config: Any, base: TextToImagePipeline, size: int) -> Callable[..., Tensor]:
    """Return (images, prompts) -> similarities [N] of the CLIP that ranks samples. Raises UserError.

    size: of the samples, in pixels. CLIP must have been trained on captions of the network's vocabulary.
    """
    clip, tokenizer = load_clip(config.clip or pretrained_path(LESSON, "clip_of_shapes"))
    name = f"--clip {config.clip}" if config.clip else "the pretrained CLIP"
    if (of_clip := clip.image_encoder.encoder.config.image_size) != size:
        raise UserError(f"--candidates: {name} ranks {of_clip}x{of_clip} pixels, these have {size}x{size}")
    if vocabulary_of(tokenizer) != vocabulary_of(base.tokenizer):
        advice = "it would rank these samples at random; name a CLIP of such images with --clip"
        raise UserError(f"--candidates: {name} was trained on captions of another vocabulary, and {advice}")
    return partial(clip_similarity, clip.to(base.device), tokenizer)


def keep_best(
    config: Any, images: Tensor, prompts: list[str], similarity: Tensor
) -> tuple[Tensor, list[str]]:
    """Return the --keep most similar of the --candidates of each prompt, with their prompts."""
    best = best_of(similarity, config.candidates, config.keep)
    means = similarity[best].mean(), similarity.mean()
    print(f"similarity to the prompt: {means[0]:.2f} of those kept, {means[1]:.2f} of all")
    return images[best], [prompts[i] for i in best.tolist()]


def vocabulary_of(tokenizer: Any) -> set[str]:
    """Return the tokens that a tokenizer knows."""
    return set(tokenizer.tokenizer.get_vocab())


def load_inpaint_inputs(config: Any, pipe: TextToImagePipeline) -> InpaintInputs | None:
    """Return --image and --mask at the resolution of a pipeline; None without --mask. Raises UserError."""
    return InpaintInputs.load(config.image, config.mask, pipe.image_shape[-1]) if config.mask else None


def choose_sampler(config: Any, base: TextToImagePipeline, n: int) -> tuple[Any, dict[str, Tensor]]:
    """Return the base model's sampler and further inputs of its network, for n samples. Raises UserError."""
    sampler = SAMPLERS[config.sampler]
    if inpaint := load_inpaint_inputs(config, base):
        return inpaint.make_sampler(base.network, sampler, n, config.num_resamples)
    if config.image:
        image = resize_square(read_image(config.image, "--image"), base.image_shape[-1])
        return partial(image_to_image, image=image, strength=config.strength, sampler=sampler), {}
    return sampler, {}


if __name__ == "__main__":
    run_command(main, Config)
