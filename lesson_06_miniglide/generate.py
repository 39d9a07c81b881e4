"""A trained network with all that is needed to draw from it."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from common.command import UserError, check_choice
from common.runs import digest
from common.sampling import in_steps, load_network, sample_batches
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_04_text_conditioning.captioned_mnist import denoiser_of_prompts, tokenizer_of
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import guided
from lesson_06_miniglide.outside_text import encoder_of, is_outside
from lesson_06_miniglide.presets import rebuild
from lesson_06_miniglide.upsampler import LOW_RES, UpsamplingUNet, noised, num_levels, shrink

LESSON = "lesson_06_miniglide"
NOISE_SEED = 715_827_883  # apart from a run's own: the noise that small pictures began as is not for them


def reader_of(facts):
    """The tokenizer of a checkpoint, or the encoder from outside that it needs. Raises UserError."""
    if is_outside(facts):
        return encoder_of(facts["text"])
    return tokenizer_of(facts)


@dataclass(frozen=True)
class Generator:
    network: torch.nn.Module
    diffusion: GaussianDiffusion
    tokenizer: CaptionTokenizer
    prompts: tuple[str, ...] = ()  # what pictures of its training show

    @classmethod
    def load(cls, checkpoint, device="auto"):
        """checkpoint: a .safetensors file or a run's folder; None: the shipped weights. Raises UserError."""
        network, diffusion, facts = load_network(checkpoint, LESSON, rebuild, device)
        # autocast keeps what it has rounded, for all steps of a sample, only of weights that can be trained
        return cls(network.requires_grad_(True), diffusion, reader_of(facts), tuple(facts["prompts"]))

    @classmethod
    def load_base(cls, checkpoint, device="auto"):
        """The same, if it draws by itself. Raises UserError."""
        generator = cls.load(checkpoint, device)
        check_base(generator.network)
        return generator

    @cached_property
    def name(self):
        """A short name of these weights, the same wherever they lie."""
        return digest(self.network)

    def draw(self, prompts, guidance_scale, config, steps=20, sampler="dpm++", **seen):
        """A sample a prompt: float [N, 3, H, W]. config: with `seed` and `device`.

        sampler: by name, or a function like those. seen: what the network sees beside x_t, by name, [N, ...]
        each.
        """
        if isinstance(sampler, str):
            check_choice("--sampler", sampler, SAMPLERS)
            sampler = SAMPLERS[sampler]
        if not 0 <= guidance_scale < float("inf"):
            raise UserError(f"a guidance scale of {guidance_scale}: it must be 0 (no caption), 1 or greater")
        sampler = in_steps(sampler, self.diffusion, steps)
        denoiser_of = guided_denoisers(self.network, self.tokenizer, prompts, guidance_scale, **seen)
        return sample_batches(sampler, denoiser_of, self.network.image_shape, len(prompts), config)

    def enlarge(self, images, prompts, noise_level, config, steps=20, sampler="dpm++"):
        """Large pictures of `images`, which are made small first: an upsampler's, without guidance.

        noise_level: the timestep whose noise the small pictures are seen in.
        """
        torch.manual_seed(config.seed + NOISE_SEED)
        level = torch.full((len(images),), noise_level)
        seen = noised(self.diffusion, shrink(images, LOW_RES), level)
        config = replace(config, seed=config.seed + 2 * NOISE_SEED)
        return self.draw(prompts, 1, config, steps, sampler, **seen)


def check_base(network):
    if isinstance(network, UpsamplingUNet):
        raise UserError("--checkpoint is a network that enlarges; name it with --upsampler")


@dataclass(frozen=True)
class Cascade:
    """A Generator whose pictures another one enlarges; is asked like a Generator."""

    base: Generator
    upsampler: Generator
    noise_level: int

    @property
    def name(self):
        return f"{self.base.name}_{self.upsampler.name}_{self.noise_level}"

    def draw(self, prompts, guidance_scale, config, steps=20, sampler="dpm++"):
        images = self.base.draw(prompts, guidance_scale, config, steps, sampler)
        return self.upsampler.enlarge(images, prompts, self.noise_level, config, steps, sampler)


def load_upsampler(checkpoint, noise_level, device, bases):
    """The Generator that --upsampler names, to enlarge what each of `bases` draws. Raises UserError."""
    try:
        upsampler = Generator.load(checkpoint, device)
    except UserError as error:
        raise UserError(str(error).replace("--checkpoint", "--upsampler")) from None
    if not isinstance(upsampler.network, UpsamplingUNet):
        raise UserError(f"--upsampler {checkpoint} does not enlarge; train --preset tiny_upsampler")
    levels = num_levels(upsampler.diffusion)
    if not 0 <= noise_level < levels:
        raise UserError(f"--noise-level is {noise_level}; it was trained with levels from 0 to {levels - 1}")
    for base in bases:
        if (size := base.network.image_shape[-1]) != LOW_RES:
            need = f"--upsampler enlarges {LOW_RES}x{LOW_RES} pixels"
            raise UserError(f"{need}, and --checkpoint draws {size}x{size}; train --preset tiny_small for it")
    return upsampler


def guided_denoisers(network, tokenizer, prompts, guidance_scale, **seen):
    """What common.sampling asks for: (indices) -> a guided denoiser for the samples of these prompts."""
    texts_of = denoiser_of_prompts(network, tokenizer, prompts, lambda network, *texts: texts)

    def denoiser_of(indices):
        here = {name: x[indices] for name, x in seen.items()}
        return guided(seeing(network, **here), *texts_of(indices), guidance_scale)

    return denoiser_of


def seeing(network, **seen):
    """(x_t, t, text) -> the output of a network that also sees these [N, ...].

    Guidance asks about each sample twice at once: what is seen is repeated as often.
    """

    def denoiser(x_t, t, text):
        again = {name: torch.cat([x] * (len(x_t) // len(x))).to(x_t.device) for name, x in seen.items()}
        return network(x_t, t, text, **again)

    return denoiser
