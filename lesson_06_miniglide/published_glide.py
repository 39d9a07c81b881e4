"""The published GLIDE (Nichol et al. 2022) in our code: OpenAI's weights, GLIDE's tokens and sampling recipe.

The weights are local files. base.pt and upsample.pt draw; base_inpaint.pt and upsample_inpaint.pt repaint:

    U=https://openaipublic.blob.core.windows.net
    for f in base upsample base_inpaint upsample_inpaint; do curl -fO $U/diffusion/dec-2021/$f.pt; done
    for f in encoder.json vocab.bpe; do curl -fO $U/gpt-2/models/124M/$f; done
    sha256sum *.pt encoder.json vocab.bpe > glide.sha256       # later: sha256sum -c glide.sha256

encoder.json is to begin with 196139668be63f3b and vocab.bpe with 1ce1664773c50f3e.

    python lesson_06_miniglide/sample.py --openai base.pt --openai-upsampler upsample.pt --vocabulary . \
        --prompt "an oil painting of a corgi"
"""

import pickle
from dataclasses import replace
from functools import partial

import torch

from common.command import UserError, pick_device
from common.data import to_float, to_uint8
from common.sampling import sample_batches
from lesson_01_ddpm.diffusion import GaussianDiffusion, clip, linear_betas
from lesson_02_improved_ddpm.schedules import cosine_betas, space_timesteps
from lesson_04_text_conditioning.prompts import say_what_is_cut
from lesson_04_text_conditioning.published import glide_from_published
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_06_miniglide.captioned_images import gpt2_tokenizer
from lesson_06_miniglide.generate import NOISE_SEED, guided_denoisers
from lesson_06_miniglide.inpainting import Repainting

BASE = {
    "image_size": 64,
    "num_channels": 192,
    "num_res_blocks": 3,
    "num_head_channels": 64,
    "attention_resolutions": "32,16,8",
    "text_ctx": 128,
    "xf_width": 512,
    "xf_layers": 16,
    "xf_heads": 8,
    "n_vocab": 50_257,
    "use_scale_shift_norm": True,
    "resblock_updown": True,
}
UPSAMPLER = BASE | {"image_size": 256, "num_res_blocks": 2, "super_res": True}
UPSAMPLER_STEPS = "fast27"
TEMPERATURE = 0.997  # of the noise that the upsampler starts from


def load_published(path, settings, flag):
    """The network in a published file; whether it repaints is seen from its first layer. Raises UserError."""
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        seen = weights["input_blocks.0.0.weight"].shape[1]
        plain = 6 if settings.get("super_res") else 3  # x_t, and low_res; repainting adds an image and a mask
        network = glide_from_published(settings | {"inpaint": seen == plain + 4}, weights)
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror})") from None
    except Exception as error:  # whatever else a file may hold, or not
        lines = (str(error) or type(error).__name__).splitlines()
        reason = "no weights alone" if isinstance(error, pickle.UnpicklingError) else lines[-1].strip()[:120]
        raise UserError(f"{flag} {path} is not the published network of that name ({reason})") from None
    return network.requires_grad_(False)


def base_process(config):
    """The base model's process with `config.steps` timesteps. Raises UserError."""
    try:
        return GaussianDiffusion(cosine_betas(1000)).keep(space_timesteps(1000, str(config.steps)))
    except ValueError as error:
        raise UserError(f"--steps {config.steps}: {error}") from None


def draw_base(network, tokenizer, prompts, guidance_scale, config, repainting=None):
    """A sample a prompt, [N, 3, 64, 64]. config: with `sampler`, `steps`, `seed` and `device`."""
    bound, seen = (repainting.bound, repainting.seen(len(prompts))) if repainting else (clip, {})
    sampler = partial(SAMPLERS[config.sampler], base_process(config), bound=bound)
    denoiser_of = guided_denoisers(network, tokenizer, prompts, guidance_scale, **seen)
    return sample_batches(sampler, denoiser_of, network.image_shape, len(prompts), config)


def enlarge(network, tokenizer, prompts, low_res, config, repainting=None):
    """The upsampler's pictures of low_res [N, 3, h, w]: without guidance, DDIM, or ancestral to repaint.

    low_res is rounded to 8 bits, as the upsampler's training images were.
    """
    process = GaussianDiffusion(linear_betas(1000)).keep(space_timesteps(1000, UPSAMPLER_STEPS))
    sampler, bound, seen = SAMPLERS["ddim"], clip, {"low_res": to_float(to_uint8(low_res))}
    if repainting:
        sampler, bound, seen = SAMPLERS["ddpm"], repainting.bound, seen | repainting.seen(len(prompts))

    def cooler(denoiser, x_T, generator):
        return sampler(process, denoiser, TEMPERATURE * x_T, generator, bound=bound)

    denoiser_of = guided_denoisers(network, tokenizer, prompts, 1, **seen)
    config = replace(config, seed=config.seed + NOISE_SEED)
    return sample_batches(cooler, denoiser_of, network.image_shape, len(prompts), config, batch_size=4)


def load_enlarger(config, size):
    """`enlarge` with the network of --openai-upsampler, for what another network has drawn. Raises UserError.

    size: of that network's pictures.
    """
    if config.mask:
        raise UserError("to repaint, --openai-upsampler needs --openai base_inpaint.pt; or leave out --mask")
    if size != BASE["image_size"] and not config.upsampler:
        raise UserError(f"--openai-upsampler enlarges 64x64 pixels, and --checkpoint draws {size}x{size}")
    tokenizer = gpt2_tokenizer(config.vocabulary, UPSAMPLER["text_ctx"])
    network = load_published(config.openai_upsampler, UPSAMPLER, "--openai-upsampler")
    return partial(enlarge, network.to(pick_device(config.device)), tokenizer)


def sample(config):
    """sample.py with --openai: (images, prompts). Raises UserError."""
    if config.checkpoint:
        raise UserError("--openai and --checkpoint name two networks; leave one out")
    if not config.vocabulary:
        raise UserError("--openai needs --vocabulary, a folder with GPT-2's encoder.json and vocab.bpe")
    if bool(config.image) != bool(config.mask):
        raise UserError("to repaint takes both, --image and --mask (white where to draw anew)")
    tokenizer = gpt2_tokenizer(config.vocabulary, BASE["text_ctx"])
    base_process(config)
    prompts = config.prompts(["an oil painting of a corgi"])
    say_what_is_cut(tokenizer, prompts)

    def load(path, settings, flag):
        size = settings["image_size"]
        repainting = Repainting.load(config.image, config.mask, size) if config.image else None
        network = load_published(path, settings, flag).to(pick_device(config.device))
        if repainting and not network.inpaint:
            raise UserError(f"{flag} {path} cannot repaint an --image; take the published one for inpainting")
        return network, repainting

    base, repainting = load(config.openai, BASE, "--openai")
    if config.openai_upsampler:
        upsampler, repainting_large = load(config.openai_upsampler, UPSAMPLER, "--openai-upsampler")
    images = draw_base(base, tokenizer, prompts, config.guidance_scale, config, repainting)
    if config.openai_upsampler:
        images = enlarge(upsampler, tokenizer, prompts, images, config, repainting_large)
    return images, prompts
