"""A trained network with all that is needed to draw from it."""

from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256

import torch

from common.command import UserError, check_choice, pick_device
from common.sampling import in_steps, load_network, sample_batches
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_04_text_conditioning.captioned_mnist import denoiser_of_prompts, tokenizer_of
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer
from lesson_05_cfg.dpm_solver import SAMPLERS
from lesson_05_cfg.guidance import guided
from lesson_06_miniglide.presets import IMAGE_SHAPE, rebuild

LESSON = "lesson_06_miniglide"


@dataclass(frozen=True)
class Generator:
    network: torch.nn.Module
    diffusion: GaussianDiffusion
    tokenizer: CaptionTokenizer
    prompts: tuple[str, ...] = ()  # what pictures of its training show

    @classmethod
    def load(cls, checkpoint, device="auto"):
        """checkpoint: a .safetensors file or a run's folder; None: the shipped weights. Raises UserError."""
        network, diffusion, facts = load_network(checkpoint, LESSON, rebuild)
        return cls(network.to(pick_device(device)), diffusion, tokenizer_of(facts), tuple(facts["prompts"]))

    @cached_property
    def name(self):
        """A short name of these weights, the same wherever they lie."""
        digest = sha256()
        for weight in self.network.state_dict().values():
            digest.update(weight.float().cpu().numpy().tobytes())
        return digest.hexdigest()[:12]

    def draw(self, prompts, guidance_scale, config, steps=20, sampler="dpm++"):
        """A sample a prompt: float [N, 3, 64, 64]. config: with `seed` and `device`."""
        check_choice("--sampler", sampler, SAMPLERS)
        if not 0 <= guidance_scale < float("inf"):
            raise UserError(f"a guidance scale of {guidance_scale}: it must be 0 (no caption), 1 or greater")
        sampler = in_steps(SAMPLERS[sampler], self.diffusion, steps)
        denoiser_for = partial(guided, guidance_scale=guidance_scale)
        denoiser_of = denoiser_of_prompts(self.network, self.tokenizer, prompts, denoiser_for)
        return sample_batches(sampler, denoiser_of, IMAGE_SHAPE, len(prompts), config)
