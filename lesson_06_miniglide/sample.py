"""Lesson 6: draw what a caption says, at 64x64; enlarge it, repaint a part of a picture, or start from one.

python lesson_06_miniglide/sample.py --checkpoint runs/lesson_06_miniglide/... --prompt "golden retriever"
"""

from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path

from common.command import UserError, as_flag, check_choice, run_command
from common.sampling import check_out, write_images
from lesson_04_text_conditioning.prompts import PromptConfig, in_rows, sample_prompts, say_what_is_cut
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import guided
from lesson_06_miniglide import published_glide
from lesson_06_miniglide.editing import image_to_image
from lesson_06_miniglide.generate import LESSON, Generator, check_base, load_upsampler, reader_of
from lesson_06_miniglide.inpainting import Repainting, open_picture
from lesson_06_miniglide.presets import rebuild


@dataclass(frozen=True)
class Config(PromptConfig):
    """Lesson 6: draw 64x64 images from captions, with classifier-free guidance."""

    # 0 ignores the caption, 1 is the plain model, more follows it harder; default 3 (to repaint: 5)
    guidance_scale: float | None = None
    # network evaluations a sample (two at once, with and without caption); default 20, of --openai 100
    steps: int | None = None
    # ddpm (ancestral), ddim or dpm++ (DPM-Solver++(2M)); default dpm++, of --openai ddpm; a network that was
    # not trained to repaint does so ancestrally
    sampler: str | None = None

    upsampler: str | None = None  # a checkpoint of --preset tiny_upsampler, to enlarge what was drawn
    noise_level: int = 100  # timestep whose noise the upsampler sees its small picture in; 0: as it is
    image: str | None = None  # a picture to start from, or with --mask to repaint
    mask: str | None = None  # a picture that is white where to draw anew, black where --image is kept
    strength: float = 0.7  # of the noise that --image starts in: 1 leaves nothing of it
    # repainting with a network that was not trained to: how often each step is taken, each time anew
    times: int = 5

    openai: str | None = None  # the published GLIDE instead: base.pt, or base_inpaint.pt to repaint
    # 64 to 256 pixels, for the published GLIDE or any other: upsample.pt, or upsample_inpaint.pt to repaint
    openai_upsampler: str | None = None
    vocabulary: str | None = None  # of the published networks: a folder of GPT-2's encoder.json, vocab.bpe


def main(config):
    refuse_what_does_nothing(config)
    config = with_defaults(config)
    if not (config.openai or config.openai_upsampler or config.image or config.mask or config.upsampler):
        denoiser_for = partial(guided, guidance_scale=config.guidance_scale)
        return sample_prompts(config, LESSON, SAMPLERS, denoiser_for, rebuild_base, reader_of)
    check_choice("--sampler", config.sampler, SAMPLERS)
    check_out(config.out)
    if config.out.endswith(".gif"):
        but = "with --openai, an upsampler, --image or --mask it must be a .png, an .npz or a folder"
        raise UserError(f"--out {config.out}: {but}")
    images, prompts = (published_glide.sample if config.openai else edit_or_enlarge)(config)
    write_images(Path(config.out), images, prompts, **in_rows(prompts))
    print(f"{len(prompts)} samples, {config.steps} steps: {config.out}")


def refuse_what_does_nothing(config):
    """Raises UserError for flags that would be given in vain."""
    given = {field.name for field in fields(Config) if getattr(config, field.name) != field.default}
    in_vain = {"openai": {"upsampler", "noise_level", "strength", "times"}, "mask": {"strength", "upsampler"}}
    for other, flags in in_vain.items():
        if other in given and (vain := sorted(flags & given)):
            raise UserError(f"{as_flag(vain[0])} does nothing beside {as_flag(other)}; leave it out")
    needed = {"openai_upsampler": {"vocabulary"}, "vocabulary": {"openai", "openai_upsampler"}}
    needed |= {"noise_level": {"upsampler"}, "strength": {"image"}, "times": {"mask"}}
    for flag, others in needed.items():
        if flag in given and not others & given:
            raise UserError(f"{as_flag(flag)} needs {' or '.join(map(as_flag, sorted(others)))}")


def with_defaults(config):
    """What is not given, as this lesson or the published GLIDE has it."""
    steps, sampler = (100, "ddpm") if config.openai else (20, "dpm++")
    scale = config.guidance_scale
    if scale is None:
        scale = 5.0 if config.mask else 3.0
    return replace(
        config, steps=config.steps or steps, sampler=config.sampler or sampler, guidance_scale=scale
    )


def rebuild_base(facts):
    network, diffusion = rebuild(facts)
    check_base(network)
    return network, diffusion


def edit_or_enlarge(config):
    """(images, prompts). Raises UserError."""
    if config.mask and not config.image:
        raise UserError("--mask says which part of an --image to draw anew; name that, too")
    if not 0 < config.strength <= 1:
        raise UserError(f"--strength is {config.strength}; it must be greater than 0 and at most 1")
    generator = Generator.load_base(config.checkpoint, config.device)
    if config.upsampler:
        upsampler = load_upsampler(config.upsampler, config.noise_level, config.device, [generator])
    if config.openai_upsampler:
        enlarge = published_glide.load_enlarger(config, generator.network.image_shape[-1])
    prompts = config.prompts(generator.prompts)
    say_what_is_cut(generator.tokenizer, prompts)
    sampler, seen = how_to_draw(config, generator.network, len(prompts))
    images = generator.draw(prompts, config.guidance_scale, config, config.steps, sampler, **seen)
    if config.upsampler:
        images = upsampler.enlarge(images, prompts, config.noise_level, config, config.steps, config.sampler)
    if config.openai_upsampler:
        images = enlarge(prompts=prompts, low_res=images, config=config)
    return images, prompts


def how_to_draw(config, network, n):
    """(sampler, what the network sees) for n samples."""
    sampler, size = SAMPLERS[config.sampler], network.image_shape[-1]
    if config.mask:
        return Repainting.load(config.image, config.mask, size).drawn_by(network, sampler, n, config.times)
    if config.image:
        image = open_picture(config.image, "--image", size)
        return partial(image_to_image, image=image, strength=config.strength, sampler=sampler), {}
    return sampler, {}


if __name__ == "__main__":
    run_command(main, Config)
