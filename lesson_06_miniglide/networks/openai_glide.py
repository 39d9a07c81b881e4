r"""The published GLIDE (Nichol et al. 2022): OpenAI's weights with the published sampling settings.

The weights are local files. base.pt and upsample.pt draw images; base_inpaint.pt and upsample_inpaint.pt also
fill masked regions. Download them with GPT-2's vocabulary:

    U=https://openaipublic.blob.core.windows.net
    for f in base upsample base_inpaint upsample_inpaint; do curl -fO $U/diffusion/dec-2021/$f.pt; done
    for f in encoder.json vocab.bpe; do curl -fO $U/gpt-2/models/124M/$f; done
    sha256sum *.pt encoder.json vocab.bpe > glide.sha256       # later: sha256sum -c glide.sha256

The hash of encoder.json begins with 196139668be63f3b, that of vocab.bpe with 1ce1664773c50f3e.

    python lesson_06_miniglide/sample.py --openai base.pt --openai-upsampler upsample.pt --vocabulary . \
        --prompt "an oil painting of a corgi"

`train.py --init-from base.pt` continues to train them; export_openai.py writes the result in the same layout.
"""

import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from common.device import pick_device
from common.errors import UserError
from common.images import to_float, to_uint8
from common.protocols import Denoiser, Model, SamplerStep
from common.sampling import sample_batches
from common.training.checkpoints import refuse_non_finite
from lesson_01_ddpm.diffusion import GaussianDiffusion, ddpm_sample, linear_betas
from lesson_02_improved_ddpm.schedules import cosine_betas, space_timesteps
from lesson_02_improved_ddpm.variational_bound import learned_range
from lesson_04_text_conditioning.openai_checkpoints import glide_from_openai, weights_from_openai
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.pipeline import TextToImagePipeline
from lesson_06_miniglide.editing.inpaint_inputs import InpaintInputs
from lesson_06_miniglide.image_data.tokenizers import gpt2_tokenizer

BASE: dict[str, Any] = {
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
UPSAMPLER: dict[str, Any] = BASE | {"image_size": 256, "num_res_blocks": 2, "super_res": True}
UPSAMPLER_STEPS = "fast27"
UPSAMPLER_BATCH = 4  # images of 256x256 pixels
UPSAMPLER_SEED = 715_827_883  # the upsampler's noise must differ from the base model's
TEMPERATURE = 0.997  # factor of the noise that the upsampler starts from
FIRST_WEIGHT = "input_blocks.0.0.weight"  # its published name
DEFAULT_PROMPT = "an oil painting of a corgi"


class BaseProcess(GaussianDiffusion):
    """The base model's process, which chooses evenly spaced timesteps as the published code does."""

    def __init__(self) -> None:
        super().__init__(cosine_betas(1000))

    def respace_evenly(self, num_steps: int) -> GaussianDiffusion:
        """Keep `num_steps` timesteps, rounded as in the published code.

        Raises ValueError if there are not so many.
        """
        return self.respace(space_timesteps(self.num_timesteps, str(num_steps)))


def upsampler_process() -> GaussianDiffusion:
    """Return the upsampler's process: 27 timesteps of a linear schedule."""
    return GaussianDiffusion(linear_betas(1000)).respace(space_timesteps(1000, UPSAMPLER_STEPS))


def load_base(path: str | Path, vocabulary: str | Path, device: str = "auto") -> TextToImagePipeline:
    """Return a pipeline of the published base model, for 64x64 images.

    The published settings are 100 steps of "ddpm" and a guidance scale of 3, or 5 to inpaint. vocabulary: a
    folder with GPT-2's encoder.json and vocab.bpe. Raises UserError.
    """
    tokenizer = gpt2_tokenizer(vocabulary, BASE["text_ctx"])
    network = load_network(path, BASE, "--openai").to(pick_device(device))
    return TextToImagePipeline(Model(network, BaseProcess(), {"prompts": [DEFAULT_PROMPT]}), tokenizer)


def load_upsampler(path: str | Path, vocabulary: str | Path, device: str = "auto") -> TextToImagePipeline:
    """Return a pipeline of the published upsampler, for `super_resolve`. Raises UserError."""
    tokenizer = gpt2_tokenizer(vocabulary, UPSAMPLER["text_ctx"])
    network = load_network(path, UPSAMPLER, "--openai-upsampler").to(pick_device(device))
    return TextToImagePipeline(Model(network, upsampler_process(), {}), tokenizer)


def load_network(path: str | Path, settings: Mapping[str, Any], flag: str) -> TextUNet:
    """Return the network in a published file, which may be one for inpainting.

    settings: BASE or UPSAMPLER. Raises UserError, naming the flag, if the file does not hold such a network.
    """
    weights = read_file(path, flag)
    in_channels = weights[FIRST_WEIGHT].shape[1]
    without_inpainting = 6 if settings.get("super_res") else 3  # channels of x_t and low_res
    inpaint = in_channels == without_inpainting + 4  # known pixels and their mask
    try:
        network = glide_from_openai({**settings, "inpaint": inpaint}, weights)
    except Exception as error:  # weights can misfit in many ways
        raise not_published(path, flag, error) from None
    return network.requires_grad_(False)


def read_file(path: str | Path, flag: str) -> dict[str, Tensor]:
    """Return the weights in a published file, under the published names.

    Raises UserError, naming the flag, if the file is not one, or if a weight is not finite.
    """
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        weights[FIRST_WEIGHT].shape[1]
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be read ({error.strerror})") from None
    except Exception as error:  # a file can be wrong in many ways
        raise not_published(path, flag, error) from None
    refuse_non_finite(weights, f"{flag} {path}")
    return weights


def load_weights(path: str | Path, flag: str) -> dict[str, Tensor]:
    """Return the weights in a published file, under the names of TextUNet. Raises UserError."""
    return weights_from_openai(read_file(path, flag))


def is_openai_file(path: str | None) -> bool:
    """Return whether a path of weights names a published file: ours are folders or .safetensors."""
    return path is not None and path.endswith(".pt")


def not_published(path: str | Path, flag: str, error: Exception) -> UserError:
    """Return the error of a file that does not hold the network that it should."""
    reason = (str(error) or type(error).__name__).splitlines()[-1].strip()[:120]
    if isinstance(error, pickle.UnpicklingError):
        reason = "it contains more than weights"
    if isinstance(error, KeyError):
        reason = f"it has no weight {reason}"
    return UserError(f"{flag} {path} is not the published network of that name ({reason})")


def super_resolve(
    upsampler: TextToImagePipeline,
    images: Float[Tensor, "n c h w"],
    prompts: Sequence[str],
    seed: int = 0,
    inpaint: InpaintInputs | None = None,
) -> Float[Tensor, "n c h_2 w_2"]:
    """Return 256x256 versions of 64x64 images by the published settings: 27 DDIM steps without guidance.

    The images are rounded to 8 bits, like those that the upsampler was trained on. inpaint: at 256x256; the
    steps are then ancestral, and its known pixels are kept.
    """
    sampler: Callable[..., Iterator[SamplerStep]] = SAMPLERS["ddim"]
    unet_kwargs = {"low_res": to_float(to_uint8(images))}
    if inpaint:
        sampler = partial(ddpm_sample, log_variance_fn=learned_range, denoised_fn=inpaint.denoised_fn)
        unet_kwargs |= inpaint.unet_kwargs(len(prompts))

    def reduced_temperature(
        denoiser: Denoiser, x_T: Tensor, generator: torch.Generator
    ) -> Iterator[SamplerStep]:
        return sampler(upsampler.process, denoiser, TEMPERATURE * x_T, generator)

    return sample_batches(
        reduced_temperature,
        upsampler.make_denoiser(prompts, 1, None, **unet_kwargs),
        upsampler.image_shape,
        len(prompts),
        seed=seed + UPSAMPLER_SEED,
        device=str(upsampler.device),
        batch_size=UPSAMPLER_BATCH,
    )
