"""Experiments with CLIP, on captioned digits and on drawn shapes. Run by experiments.py."""

from dataclasses import replace
from functools import partial

import torch

from common.captions import CAPTIONS, VARIANTS, CaptionedDigits, balanced_prompts
from common.classifier import ready
from common.data import to_pixels
from common.evaluation import fid_between
from common.experiments import quality
from common.pictures import curves
from common.runs import load_weights, shipped_weights
from common.sampling import load_network, sample_batches
from common.training import TrainConfig
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_03_adm.adm_unet import ADMConfig
from lesson_03_adm.classifier_guidance import guide_mean
from lesson_04_text_conditioning import captioned_mnist
from lesson_04_text_conditioning.experiments import Captioned
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_06_miniglide import shapes
from lesson_06_miniglide.clip import NoisyCLIP, PatchCLIP, clip_gradient, loss_clip, nearest_caption
from lesson_06_miniglide.evaluate import redrawn, thumbnails
from lesson_06_miniglide.generate import LESSON, Generator, guided_denoisers
from lesson_06_miniglide.presets import new_diffusion
from lesson_06_miniglide.shapes_experiments import SHOWN, Shapes

SHOWN_STEPS = 50  # ancestral
CLIP_SCALES = (0, 30, 100, 300, 1000)
FREE_SCALES = (1.5, 2, 3, 4)
CLIP_IMAGES = ADMConfig(in_channels=3, channel_mult=(0.5, 1, 2, 2), attention_resolutions=(8, 4))
NOISE = (0, 200, 400, 600, 700, 800, 900, 999)  # timesteps at which CLIP is asked
OF = 60  # captions, of which one is a picture's
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


class Digits(Captioned):
    lesson, kind = LESSON, TrainConfig


# -- the networks --------------------------------------------------------------------------------------------


def new_clip(tokenizer, kind=NoisyCLIP):
    images = replace(CLIP_IMAGES, in_channels=CLIP_IMAGES.in_channels * kind.patch**2)
    return kind(images, TextConfig(tokenizer.vocab_size, tokenizer.context))


def trained_clip(experiment, diffusion, name="clip", kind=NoisyCLIP, slow=NoisyCLIP.slow, **settings):
    """The CLIP of captioned digits, which `retrieval` and `clip_guidance` share; or one with other rates.
    settings: as `experiment.train` takes them."""
    settings = {"batch_size": 32, "learning_rate": 1.5e-3} | settings
    torch.manual_seed(experiment.config.seed)
    clip = new_clip(experiment.tokenizer, kind)
    clip.slow = slow
    return experiment.train(name, clip, partial(loss_clip, diffusion), **settings)


def trained_clip_of_shapes(experiment, diffusion):
    """That of drawn shapes, for both experiments on these."""
    data = experiment.data, experiment.validation
    return trained_clip(experiment, diffusion, kind=PatchCLIP, data=data, batch_size=64)


def shipped_clip(tokenizer, name="clip", kind=NoisyCLIP):
    """As it is shipped: pretrained/clip.safetensors, or clip_of_shapes. Raises UserError."""
    weights, _ = load_weights(shipped_weights(LESSON, name), LESSON)
    return ready(new_clip(tokenizer, kind), weights)


@torch.no_grad()
def embedded(clip, tokenizer, captions):
    device = next(clip.parameters()).device
    return clip.embed_captions(*(x.to(device) for x in tokenizer.encode(captions)))


# -- what it reads -------------------------------------------------------------------------------------------


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
        heard = nearest_caption(diffusion, clip, x_0.to(captions.device), captions, t).cpu()
        return {"n": len(x_0), "of": len(texts), "found": (heard == right).float().mean().item()}

    for name, clip in clips.items():
        captions = embedded(clip, experiment.tokenizer, texts)
        rows = [experiment.row(measure, clip, captions, t, clip=name, t=t) for t in NOISE]
        lines[name] = [(row["t"], row["found"]) for row in rows]
    experiment.save(curves(lines, "t", "share of captions found", logarithmic=False))


def turned_round(caption):
    """A caption of two shapes with the opposite relation."""
    relation = shapes.parse(caption).relation
    return caption.replace(relation, OPPOSITE[relation])


def retrieval_of_shapes(config):
    """The same for shapes, of the captions of sixty pictures; any that is true of the picture is right. And
    of two, its own and the same with left for right or above for below: does it know who stands where?"""
    experiment = Shapes(config, trainings="clip_of_shapes")
    diffusion = new_diffusion(1000)
    clip = trained_clip_of_shapes(experiment, diffusion)
    pixels, groups = to_pixels(experiment.real), torch.arange(len(experiment.captions)).split(OF)
    pairs = [i for i, caption in enumerate(experiment.captions) if shapes.parse(caption).relation]
    said = embedded(clip, experiment.tokenizer, experiment.captions)
    opposites = embedded(clip, experiment.tokenizer, [turned_round(experiment.captions[i]) for i in pairs])

    def heard(i, captions, t):
        return nearest_caption(diffusion, clip, experiment.real[i].to(captions.device), captions, t).tolist()

    def measure(t):
        torch.manual_seed(config.seed)
        found = order = 0
        for i in groups:
            nearest = [experiment.captions[i[k]] for k in heard(i, said[i], t)]
            found += shapes.share_right(pixels[i], nearest) * len(i)
        for i, opposite in zip(pairs, opposites):
            order += heard([i], torch.stack([said[i], opposite]), t)[0] == 0
        return {"n": len(pixels), "of": OF, "found": found / len(pixels), "order": order / max(1, len(pairs))}

    rows = [experiment.row(measure, t, t=t) for t in NOISE]
    lines = {f"found, of {OF}": [(row["t"], row["found"]) for row in rows]}
    lines["who stands where"] = [(row["t"], row["order"]) for row in rows]
    experiment.save(curves(lines, "t", "share of captions found", logarithmic=False))


# -- what it leads to ----------------------------------------------------------------------------------------


def draw_led(generator, clip, prompts, scale, clip_scale, config):
    """A sample a prompt, [N, C, H, W], led by either: a scale of 1 is no classifier-free guidance, a
    clip_scale of 0 none by CLIP."""
    network, few = generator.network, generator.diffusion.evenly(SHOWN_STEPS)
    captions = embedded(clip, generator.tokenizer, prompts)
    denoiser_of = guided_denoisers(network, generator.tokenizer, prompts, scale)

    def sampler(indices, x_T, generator):  # in the place of the denoiser come the samples' numbers
        guide = guide_mean(clip_gradient(clip, captions[indices], clip_scale))
        settings = {"guide": guide} if clip_scale else {}
        return SAMPLERS["ddpm"](few, denoiser_of(indices), x_T, generator, **settings)

    return sample_batches(sampler, lambda indices: indices, network.image_shape, len(prompts), config)


def side_by_side(experiment, generator, clip, prompts, measure, shown):
    """A row for each strength of both kinds of guidance, and two pictures: FID against diversity; samples of
    the prompts `shown`. measure: samples of `prompts` -> a dict, with "fid" and "diversity"."""
    draw = partial(draw_led, generator, clip)
    config, lines, rows = experiment.config, {}, {}

    def measured(way):
        return measure(draw(prompts, *way, config))

    ways = {("CLIP", scale): (1, scale) for scale in CLIP_SCALES}
    ways |= {("classifier-free", scale): (scale, 0) for scale in FREE_SCALES}
    for (kind, scale), way in ways.items():
        row = experiment.row(measured, way, guidance=kind, scale=scale)
        # no guidance is where both begin
        lines.setdefault(kind, lines["CLIP"][:1] if lines else []).append((row["diversity"], row["fid"]))
        rows[f"{kind}, {scale:g}"] = draw(shown, *way, config)
    experiment.save(curves(lines, "diversity", "FID"))
    scale = 70 / generator.network.image_shape[-1]  # as large on the page, however many pixels
    experiment.save_rows(rows, "_samples", scale=scale, column_labels=shown)


def clip_guidance(config):
    """Nichol et al. 2022, section 5: at the same diversity, guidance without a classifier wins."""
    network, diffusion, _ = load_network(None, "lesson_05_cfg", captioned_mnist.rebuild, config.device)
    experiment = Digits(config, weights_of="lesson_05_cfg", trainings="clip")
    generator = Generator(network, diffusion, experiment.tokenizer)
    clip = trained_clip(experiment, diffusion)
    prompts, digits, colours = balanced_prompts(config.num_samples)
    measure = partial(quality, reference=experiment.reference, digits=digits, colours=colours)
    side_by_side(experiment, generator, clip, prompts, measure, captioned_mnist.PROMPTS)


def clip_guidance_of_shapes(config):
    """The same for drawn shapes, of which it can be said who is right; each caption is drawn twice."""
    generator = Generator.load(None, config.device)
    experiment = Shapes(config, weights_of=LESSON, trainings="clip_of_shapes")
    clip = trained_clip_of_shapes(experiment, generator.diffusion)
    once = experiment.captions[: (config.num_samples + 1) // 2]
    real = thumbnails(redrawn(once * 2, config.seed + 2))

    def spread(features):
        """The mean distance of two pictures of a caption."""
        return (features[: len(once)] - features[len(once) :]).norm(dim=1).mean().item()

    def measure(samples):
        pixels = to_pixels(samples)
        seen, right = thumbnails(pixels), shapes.share_right(pixels, once * 2)
        row = {"n": len(seen), "all_right": right, "diversity": spread(seen) / spread(real)}
        return row | {"fid": fid_between(real, seen)}

    side_by_side(experiment, generator, clip, once * 2, measure, SHOWN)
