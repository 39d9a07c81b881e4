"""How much FID and KID vary between sets of equally many images, which only differ by chance."""

import math
from collections import defaultdict
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor

from common.digits.classifier import load_digit_classifier
from common.digits.evaluation import Reference, fid_to_reference, reference_for
from common.digits.mnist import load_splits
from common.metrics import kid_with_error
from common.plotting import plot_curves
from common.results.experiments import ExperimentConfig, open_table, save_figure, with_default_steps
from common.results.table import Row
from common.sampling import sample_batches
from lesson_01_ddpm.diffusion import ddpm_sample
from lesson_01_ddpm.model import IMAGE_SHAPE, LESSON, load, make_diffusion

SET_SIZES = (250, 500, 1000, 2000)
MIN_SETS, MAX_SETS = 6, 40  # a standard deviation of 6 values is uncertain by a third, one of 40 by a ninth
NUM_REAL = 20_000  # real digits
SAMPLING_STEPS = 10
COLUMN_TITLES = {
    "sets": "sets of n",
    "fid_spread": ("standard deviation of FID", ".2f"),
    "kid_spread": ("standard deviation of KID", ".2f"),
}


def measure_spread(features: Float[Tensor, "m d"], n: int, reference: Reference) -> Row:
    """Return means and standard deviations of FID and KID over disjoint sets of n features.

    kid_error: the standard error of KID that a single set leads to, as a root mean square over the sets.
    """
    sets = features.split(n)[: min(len(features) // n, MAX_SETS)]
    fid = torch.tensor([fid_to_reference(part, reference) for part in sets])
    kid, kid_error = torch.tensor([kid_with_error(reference.features, part) for part in sets]).T
    return {
        "sets": len(sets),
        "fid": fid.mean().item(),
        "fid_spread": fid.std().item(),
        "kid": kid.mean().item(),
        "kid_spread": kid.std().item(),
        "kid_error": math.sqrt(kid_error.square().mean()),
    }


def metric_errors(config: ExperimentConfig) -> None:
    """Measure how much FID and KID vary between sets of real digits, and between sets of samples."""
    table = open_table(LESSON, with_default_steps(config), weights_of=LESSON)
    digits, _ = load_splits(config.dataset, config.data_dir)
    reference, classifier = reference_for(digits), load_digit_classifier()
    network = load(device=config.device).network
    sampler = partial(ddpm_sample, make_diffusion().respace_evenly(SAMPLING_STEPS))
    samples = sample_batches(
        sampler,
        lambda indices: network,
        IMAGE_SHAPE,
        config.num_samples,
        seed=config.seed,
        device=config.device,
    )
    shuffled = torch.randperm(len(digits), generator=torch.Generator().manual_seed(0))
    kinds = {
        "real digits": digits.images[shuffled[:NUM_REAL]],
        f"samples, {SAMPLING_STEPS} steps": samples.float().cpu(),
    }
    curves = defaultdict(list)
    for name, images in kinds.items():
        features, _ = classifier.predict(images)
        for n in SET_SIZES:
            if len(features) < MIN_SETS * n:
                continue
            row = table.row(partial(measure_spread, features, n, reference), images=name, n=n)
            for metric in ("fid", "kid"):
                curves[f"{metric.upper()}, {name}"].append((n, row[f"{metric}_spread"]))
    save_figure(table, plot_curves(curves, "n", "standard deviation between sets"))
