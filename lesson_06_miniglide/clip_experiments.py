"""Experiments with CLIP, on captioned digits. Run by experiments.py."""

from functools import partial

import torch

from common.captions import CAPTIONS, VARIANTS, CaptionedDigits, balanced_prompts
from common.classifier import ready
from common.experiments import quality
from common.pictures import curves
from common.runs import load_weights, shipped_weights
from common.sampling import load_network, sample_batches
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_03_adm.adm_unet import ADMConfig
from lesson_03_adm.classifier_guidance import guide_mean
from lesson_04_text_conditioning import captioned_mnist
from lesson_04_text_conditioning.captioned_mnist import denoiser_of_prompts
from lesson_04_text_conditioning.experiments import Captioned
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_05_cfg.guidance import guided
from lesson_06_miniglide.clip import NoisyCLIP, clip_gradient, loss_clip, retrieval_accuracy
from lesson_06_miniglide.generate import LESSON

SHOWN_STEPS = 50  # ancestral
SHOWN = captioned_mnist.PROMPTS
CLIP_SCALES = (0, 30, 100, 300, 1000)
FREE_SCALES = (1.5, 2, 3, 4)
CLIP_IMAGES = ADMConfig(in_channels=3, channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4))
NOISE = (0, 200, 400, 600, 700, 800, 900, 999)  # timesteps at which CLIP is asked


class Digits(Captioned):
    lesson = LESSON


def new_clip(tokenizer):
    return NoisyCLIP(CLIP_IMAGES, TextConfig(tokenizer.vocab_size, tokenizer.context))


def trained_clip(experiment, diffusion, name="clip", slow=NoisyCLIP.slow):
    """The CLIP of captioned digits, which `retrieval` and `clip_guidance` share; or one with other rates."""
    torch.manual_seed(experiment.config.seed)
    clip = new_clip(experiment.tokenizer)
    clip.slow = slow
    return experiment.train(name, clip, partial(loss_clip, diffusion))


def shipped_clip(tokenizer):
    """The same as it is shipped: pretrained/clip.safetensors. tokenizer: lesson 4's. Raises UserError."""
    weights, _ = load_weights(shipped_weights(LESSON, "clip"), LESSON)
    return ready(new_clip(tokenizer), weights)


@torch.no_grad()
def embedded(clip, tokenizer, captions):
    device = next(clip.parameters()).device
    return clip.embed_captions(*(x.to(device) for x in tokenizer.encode(captions)))


def retrieval(config):
    """Of sixty captions, which is this picture's? The more noise there is in it, the fewer are found."""
    experiment, diffusion = Digits(config, trainings="clip"), captioned_mnist.new_diffusion()
    clips = {"clip": trained_clip(experiment, diffusion)}
    clips["text at the full rate"] = trained_clip(experiment, diffusion, "full_rate", slow={})
    data = CaptionedDigits(experiment.held_back, named=1.0)
    torch.manual_seed(config.seed)
    x_0, index = data.batch(torch.arange(min(config.num_samples, len(data))))
    said = index // VARIANTS * VARIANTS  # any wording is right: the first stands for all
    places = said.unique()
    texts = [CAPTIONS[i] for i in places.tolist()]
    right, lines = torch.searchsorted(places, said), {}

    def measure(clip, captions, t):
        torch.manual_seed(config.seed)
        there = captions.device
        found = retrieval_accuracy(diffusion, clip, x_0.to(there), captions, right.to(there), t)
        return {"n": len(x_0), "of": len(texts), "found": found}

    for name, clip in clips.items():
        captions = embedded(clip, experiment.tokenizer, texts)
        rows = [experiment.row(measure, clip, captions, t, clip=name, t=t) for t in NOISE]
        lines[name] = [(row["t"], row["found"]) for row in rows]
    experiment.save(curves(lines, "t", "share of captions found", logarithmic=False))


def clip_guidance(config):
    """Nichol et al. 2022, section 5: at the same diversity, guidance without a classifier wins."""
    network, diffusion, _ = load_network(None, "lesson_05_cfg", captioned_mnist.rebuild)
    experiment = Digits(config, weights_of="lesson_05_cfg", trainings="clip")
    tokenizer, clip = experiment.tokenizer, trained_clip(experiment, diffusion)
    lines, shown = {"CLIP": []}, {}
    prompts, digits, colours = balanced_prompts(config.num_samples)
    few = diffusion.evenly(SHOWN_STEPS)

    def draw(prompts, scale, clip_scale):
        captions = embedded(clip, tokenizer, prompts)
        denoiser_for = partial(guided, guidance_scale=scale)
        denoiser_of = denoiser_of_prompts(network, tokenizer, prompts, denoiser_for)

        def sampler(indices, x_T, generator):  # in the place of the denoiser come the samples' numbers
            guide = guide_mean(clip_gradient(clip, captions[indices], clip_scale))
            settings = {"guide": guide} if clip_scale else {}
            return SAMPLERS["ddpm"](few, denoiser_of(indices), x_T, generator, **settings)

        shape = captioned_mnist.IMAGE_SHAPE
        return sample_batches(sampler, lambda indices: indices, shape, len(prompts), config)

    def measure(scale, clip_scale):
        return quality(draw(prompts, scale, clip_scale), experiment.reference, digits, colours)

    for clip_scale in CLIP_SCALES:
        row = experiment.row(measure, 1, clip_scale, guidance="CLIP", scale=clip_scale)
        lines["CLIP"].append((row["diversity"], row["fid"]))
        shown[f"CLIP, {clip_scale}"] = draw(SHOWN, 1, clip_scale)
    lines["classifier-free"] = lines["CLIP"][:1]  # no guidance is where both begin
    for scale in FREE_SCALES:
        row = experiment.row(measure, scale, 0, guidance="classifier-free", scale=scale)
        lines["classifier-free"].append((row["diversity"], row["fid"]))
        shown[f"classifier-free, {scale:g}"] = draw(SHOWN, scale, 0)
    experiment.save(curves(lines, "diversity", "FID"))
    experiment.save_rows(shown, "_samples", scale=2.2, column_labels=SHOWN)
