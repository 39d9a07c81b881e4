"""How good are the samples? FID and KID against any images with captions; breeds, and what shapes show.

    python lesson_06_miniglide/evaluate.py --checkpoint RUN --data-dir DOGS --dogs        photos of dogs
    python lesson_06_miniglide/evaluate.py --checkpoint RUN                               shapes
    python lesson_06_miniglide/evaluate.py --checkpoint SIMPLE --checkpoint HYBRID --data-dir COCO \\
        --num-samples 5000 --guidance-scale 3 --steps 100 --sampler ddpm --features inception

The last is the report's Table 3. Samples are kept in --out with their captions; interrupted, it goes on.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro

from common.command import UserError, as_flag, check_choice, run_command
from common.data import to_pixels
from common.evaluation import fid_between, kid_between
from common.runs import describe_machine, make_folder, write_json
from common.sampling import write_npz
from lesson_06_miniglide import shapes
from lesson_06_miniglide.cache import RESIZE_FILTER
from lesson_06_miniglide.captioned_images import as_batch, drawn_shapes, load_images
from lesson_06_miniglide.generate import Cascade, Generator, load_upsampler
from lesson_06_miniglide.photo_judge import photo_judge
from lesson_06_miniglide.upsampler import LOW_RES, shrink

CHUNK = 100  # samples drawn at a time and kept in one file


@dataclass(frozen=True)
class Config:
    """Measure checkpoints of lesson 6."""

    # a run's folder or a .safetensors file; can be given several times; default: the shipped weights
    checkpoint: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    data_dir: str | None = None  # what to compare with, as in train.py; without it, drawn shapes
    dogs: bool = False  # take --data-dir as Stanford Dogs; read the breeds, too
    held_back_dir: str | None = None  # more such images, never trained on: what is memorised is told by them
    image_limit: int | None = None
    resize: str = "squish"  # or crop; bicubic
    cache_dir: str | None = None
    allow_broken: bool = False
    num_samples: int = 1000  # their captions are spread over those of the data set
    guidance_scale: float = 3.0
    steps: int = 20
    sampler: str = "dpm++"  # ddpm, ddim or dpm++
    upsampler: str | None = None  # a checkpoint of --preset tiny_upsampler, to enlarge the samples first
    noise_level: int = 100  # timestep whose noise it sees them in
    features: str = "judge"  # inception (needs torch-fidelity and a download), or judge (photo_judge.py)
    flip: bool = True  # as in training: what is memorised may be so mirrored
    seed: int = 0
    device: str = "auto"
    out: str = "evaluation"  # the folder for samples and evaluation.json


def draw_all(generator, captions, name, config):
    """uint8 [N, 64, 64, 3], a sample a caption; a chunk that is on the disk already is not drawn again."""
    settings = f"s{config.guidance_scale:g}_{config.sampler}_{config.steps}_seed{config.seed}"
    folder = Path(config.out) / f"{name}_{generator.name}_{settings}_n{len(captions)}"
    make_folder(folder, "--out")
    parts = []
    for start in range(0, len(captions), CHUNK):
        here, path = captions[start : start + CHUNK], folder / f"{start:06}.npz"
        if not path.exists():
            seeded = replace(config, seed=config.seed * 1_000_003 + start)
            images = generator.draw(here, config.guidance_scale, seeded, config.steps, config.sampler)
            write_npz(path, images, here)
            print(f"{start + len(here)} of {len(captions)} samples", flush=True)
        with np.load(path) as chunk:
            if chunk["prompts"].tolist() != here:
                raise UserError(f"--out {folder} holds samples of other captions; name another folder")
            parts.append(chunk["images"])
    return np.concatenate(parts)


def inception():
    """(uint8 images [N, 64, 64, 3]) -> [N, 2048], the features that papers use. Raises UserError."""
    try:
        from torchmetrics.image.fid import NoTrainInceptionV3

        network = NoTrainInceptionV3("inception-v3-compat", ["2048"])
    except (ImportError, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--features inception cannot be had ({reason}); pip install torch-fidelity and allow its "
            "download of 91 MB, or use --features judge"
        ) from None

    def features_of(images):
        batches = np.array_split(images, -(-len(images) // 50))
        return torch.cat([network(torch.from_numpy(b).permute(0, 3, 1, 2)).float() for b in batches])

    return features_of


def judge():
    network, _ = photo_judge()
    return lambda images: network.read(images)[0]


def thumbnails(images):
    """uint8 [N, 64, 64, 3] -> [N, 192], the colours at 8x8: what stands where, in drawings of shapes."""
    return shrink(as_batch(images), 8).flatten(1)


FEATURES = {"inception": inception, "judge": judge}


def compare(samples, real, features_of, more=None):
    """FID and KID of two sets of images. The floor is the FID of real images to real ones: to `more` of them,
    or where there are no more, of one half to the other."""
    drawn, there = features_of(samples), features_of(real)
    if more is None:
        order = torch.randperm(len(there), generator=torch.Generator().manual_seed(0))
        one, other = there[order].chunk(2)
    else:
        one, other = there, features_of(more)
    return {
        "fid": fid_between(there, drawn),
        "fid_floor": fid_between(one, other),
        "kid": kid_between(there, drawn),
    }


def read_dogs(samples, captions):
    """What the judge reads in samples of breeds; how well it reads real photos stands in its metadata."""
    judge, breeds = photo_judge()
    read = judge.read(samples)[1]
    known = torch.tensor([caption in breeds for caption in captions])
    wanted = torch.tensor([breeds.index(caption) for caption in captions if caption in breeds])
    return {
        "read_as_dog": (read.argmax(-1) < len(breeds)).float().mean().item(),
        "breed_accuracy": (read[known, :-1].argmax(-1) == wanted).float().mean().item(),
    }


def blurred(images):
    """uint8 [N, 64, 64, 3] with no more detail than 16x16 pixels have."""
    small = shrink(as_batch(images), LOW_RES)
    return to_pixels(F.interpolate(small, images.shape[1:3], mode="bilinear", align_corners=False))


def memorised(samples, images, held_back, flip=True):
    """The share of samples nearer to a training image than 99 % of the images held back are (in pixels).

    flip: training saw the images mirrored, too.
    """

    def nearest(some):
        some, best = as_batch(some).flatten(1), torch.tensor(torch.inf)
        for start in range(0, len(images), 1000):
            part = images[start : start + 1000]
            for there in (part, part[:, :, ::-1]) if flip else (part,):
                best = torch.cdist(some, as_batch(there).flatten(1)).amin(1).minimum(best)
        return best

    return (nearest(samples) < nearest(held_back).quantile(0.01)).float().mean().item()


def redrawn(captions, seed):
    """uint8 [N, 64, 64, 3], a drawing a caption."""
    rng = random.Random(seed)
    return np.stack([shapes.draw(shapes.parse(caption), rng) for caption in captions])


def check_shapes(generator, config):
    """The shares of samples that show all of their caption, for captions as in training and held out; FID
    and KID of the former to fresh drawings of their captions, the floor of these to others."""
    measured = {"n": config.num_samples}
    for name, held_out in (("all_right", False), ("all_right_held_out", True)):
        data = drawn_shapes(config.num_samples, seed=config.seed + 1, held_out=held_out)
        captions = data.captions_of(torch.arange(len(data)))
        samples = draw_all(generator, captions, name, config)
        measured[name] = shapes.share_right(samples, captions)
        if not held_out:
            again = redrawn(captions, config.seed + 2)
            distances = compare(samples, data.images, thumbnails, again)
    return measured | distances


def check_photos(generator, data, features_of, config):
    n = min(config.num_samples, len(data))
    if n < 4:
        raise UserError(f"--data-dir: {n} photos are too few to compare with; at least 4 are needed")
    captions = data.captions_of(torch.linspace(0, len(data) - 1, n).long())
    samples = draw_all(generator, captions, data.name, config)
    measured = {"n": n} | compare(samples, data.images, features_of)
    if config.dogs:
        measured |= read_dogs(samples, captions)
    if config.held_back_dir:
        held_back = load_images(replace(config, data_dir=config.held_back_dir))
        seen, photos = data.images, held_back.images
        measured["memorised"] = memorised(samples, seen, photos, config.flip)
        measured["memorised_blurred"] = memorised(blurred(photos), seen, photos, config.flip)
    return measured


def main(config):
    check_choice("--features", config.features, FEATURES)
    if config.num_samples < 4:
        raise UserError(f"--num-samples is {config.num_samples}; four are the least that can be compared")
    for flag in ("dogs", "held_back_dir", "image_limit"):
        if getattr(config, flag) and not config.data_dir:
            raise UserError(f"{as_flag(flag)} needs --data-dir, the images to compare with")
    features_of = FEATURES[config.features]() if config.data_dir else None
    generators = [Generator.load_base(c, config.device) for c in config.checkpoint or (None,)]
    if config.upsampler:
        upsampler = load_upsampler(config.upsampler, config.noise_level, config.device, generators)
        generators = [Cascade(base, upsampler, config.noise_level) for base in generators]
    data = load_images(config) if config.data_dir else None
    make_folder(config.out, "--out")
    rows = []
    settings = ["guidance_scale", "sampler", "seed"]
    settings += ["upsampler", "noise_level"] if config.upsampler else []
    settings += ["resize", "features"] if data else []
    settings = {name: getattr(config, name) for name in settings} | {"sample_steps": config.steps}
    settings |= {"resize_filter": RESIZE_FILTER} if data else {"features": "thumbnails"}
    for checkpoint, generator in zip(config.checkpoint or ("shipped",), generators):
        if data:
            measured = check_photos(generator, data, features_of, config)
        else:
            measured = check_shapes(generator, config)
        rows.append({"checkpoint": checkpoint, **settings, **measured})
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()))
    write_json(
        Path(config.out) / "evaluation.json", {"rows": rows, "machine": describe_machine(config.device)}
    )


if __name__ == "__main__":
    run_command(main, Config)
