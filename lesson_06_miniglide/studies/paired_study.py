"""Upsampling and inpainting with the pretrained networks, compared on the same images."""

from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from common.images import to_pixels, to_tensor
from common.metrics import fid_between
from common.plotting import plot_bars
from common.results.experiments import ExperimentConfig, open_table, save_figure
from common.training.checkpoints import pretrained_path
from lesson_06_miniglide.image_data.captioned_images import make_shapes
from lesson_06_miniglide.networks.presets import LESSON
from lesson_06_miniglide.pipeline import MiniGlidePipeline, UpsamplerPipeline
from lesson_06_miniglide.shapes.checker import matches_caption
from lesson_06_miniglide.studies.editing_study import NOISE_LEVELS, patches, seam

BOOTSTRAPS = 200
COLUMN_TITLES = {
    "fid_change": ("change of the FID", "+.3f"),
    "fid_change_error": ("its standard error", ".3f"),
    "only_here": "correct only here",
    "only_before": "correct only at level 0",
}


def correct(images: Float[Tensor, "n 3 64 64"], captions: list[str]) -> Bool[Tensor, "n"]:
    """Return which images match their captions."""
    return torch.tensor([matches_caption(*pair) for pair in zip(to_pixels(images), captions)])


def noise_levels(config: ExperimentConfig) -> None:
    """Enlarge the same samples at several noise-augmentation levels, each compared with level 0.

    The error of a change of the FID is its standard deviation over bootstrap samples of the images.
    """
    table, n = open_table(LESSON, config, LESSON), config.num_samples
    shapes = make_shapes(n, seed=1)
    captions, real = shapes.captions_for(torch.arange(n)), to_tensor(shapes.images)
    base = MiniGlidePipeline.from_pretrained(pretrained_path(LESSON, "small"), config.device)
    upsampler = UpsamplerPipeline.from_pretrained(pretrained_path(LESSON, "upsampler"), config.device)
    small = cache(lambda: base(captions, 3, seed=config.seed, progress_bar=False).tensor)

    @cache
    def enlarged(level: int) -> Tensor:
        return upsampler.super_resolve(small(), captions, level, seed=config.seed)

    def measure(level: int) -> dict[str, Any]:
        images = enlarged(level)
        here, before = correct(images, captions), correct(enlarged(0), captions)
        row = {
            "n": n,
            "caption_accuracy": here.float().mean().item(),
            "only_here": (here & ~before).sum().item(),
            "only_before": (before & ~here).sum().item(),
            "patch_fid": fid_between(patches(real), patches(images)),
        }
        if level == 0:
            return row
        cut = [patches(x).unflatten(0, (n, -1)) for x in (real, images, enlarged(0))]
        generator, changes = torch.Generator().manual_seed(0), []
        for _ in range(BOOTSTRAPS):
            chosen = torch.randint(n, (n,), generator=generator)
            drawn_real, drawn, drawn_before = (x[chosen].flatten(0, 1) for x in cut)
            changes.append(fid_between(drawn_real, drawn) - fid_between(drawn_real, drawn_before))
        change = row["patch_fid"] - fid_between(patches(real), patches(enlarged(0)))
        return row | {"fid_change": change, "fid_change_error": torch.tensor(changes).std().item()}

    rows = {level: table.row(partial(measure, level), noise_level=level) for level in NOISE_LEVELS}
    changes = {f"level {k}": (row["fid_change"], row["fid_change_error"]) for k, row in rows.items() if k}
    save_figure(table, plot_bars(changes, "change of the FID of patches from level 0"))


def halved_shapes(n: int) -> tuple[Float[Tensor, "{n} 3 64 64"], list[str], Float[Tensor, "{n} 1 64 64"]]:
    """Return n images of one shape that the border between left and right half cuts, captions, and masks.

    The masks are 1 in the left half, which is known.
    """
    shapes = make_shapes(20 * n, seed=11)
    captions, images = shapes.captions_for(torch.arange(20 * n)), to_tensor(shapes.images)
    is_cut = (images[..., 31:33].amax((1, 2)) > -0.5).all(1).tolist()  # a bright pixel on both sides
    single = [len(caption.split()) <= 4 and caption.startswith("a ") for caption in captions]
    chosen = [i for i in range(20 * n) if is_cut[i] and single[i]][:n]
    keep = torch.ones(n, 1, 64, 64)
    keep[..., 32:] = 0
    return images[chosen], [captions[i] for i in chosen], keep


def compare(
    rows: Mapping[str, Float[Tensor, "n 3 64 64"]], captions: list[str], keep: Float[Tensor, "n 1 64 64"]
) -> pd.DataFrame:
    """Return how many images of each row are correct, their mean seam, and the changes from the row above.

    Changes have standard errors of paired differences, since all rows fill the same images.
    """
    table, before = {}, None
    for name, images in rows.items():
        seams = torch.tensor([seam(*pair) for pair in zip(images.split(1), keep.split(1))])
        scores = torch.stack([correct(images, captions).float(), seams])
        table[name] = {"correct": f"{scores[0].mean():.0%}", "seam": f"{scores[1].mean():.3f}"}
        if before is not None:
            change = scores - before
            mean, error = change.mean(1), change.std(1) / len(images) ** 0.5
            table[name]["change of correct"] = f"{mean[0]:+.0%} ± {error[0]:.0%}"
            table[name]["change of seam"] = f"{mean[1]:+.3f} ± {error[1]:.3f}"
        before = scores
    return pd.DataFrame(table).T.fillna("")
