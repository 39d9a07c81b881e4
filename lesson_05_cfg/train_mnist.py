"""Lesson 5: train with caption dropout, then sample at several guidance scales, and measure.

python lesson_05_cfg/train_mnist.py
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tyro.conf import arg

from common.cli import Fraction, SampleCount, run_command
from common.digits.captions import balanced_prompts
from common.digits.classifier import DigitClassifier
from common.digits.evaluation import Reference, evaluate, format_metrics, reference_for
from common.digits.mnist import Digits, load_splits
from common.plotting import plot_grid
from common.protocols import Model, TextToImageNetwork
from common.training.config import DigitsConfig
from common.training.run_dir import RunDir, saved_config
from common.training.train import train
from lesson_01_ddpm.model import SamplingSteps
from lesson_04_text_conditioning.captioned_mnist import (
    PROMPTS,
    TokenizedDigits,
    train_tokenizer,
    validation_batch,
)
from lesson_04_text_conditioning.model import LR_SCALES, build_model
from lesson_04_text_conditioning.velocity import loss_hybrid_velocity
from lesson_05_cfg.guidance import caption_loss, drop_captions
from lesson_05_cfg.pipeline import LESSON, TextToImagePipeline
from lesson_05_cfg.timesteps import sample_noisy_timesteps

SWEEP = (0, 1, 2, 3, 4, 7, 10, 20)  # guidance scales that are measured
MAIN_SCALE = 3  # guidance scale of the previews during training, and of --num-eval
OTHER_SAMPLES = 200  # samples that are measured at every other scale, at most


@dataclass(frozen=True)
class Config(DigitsConfig):
    """Lesson 5: train a text-to-image model of coloured digits for classifier-free guidance."""

    # fraction of captions replaced by the empty one
    caption_dropout: Annotated[Fraction, arg(aliases=["--drop-caption"])] = 0.1
    sample_steps: SamplingSteps = 15  # DPM-Solver++ steps per sample
    num_eval: SampleCount = 1000  # samples that are measured at s = 3; at the other scales 200 at most

    default_steps = 2000
    default_minutes = 45.0  # for slow machines; with fast bf16 two cores need 9


def run(config: Config, data: tuple[Digits, Digits], classifier: DigitClassifier | None = None) -> nn.Module:
    """Train on `data`, measure at every guidance scale, and return the averaged network.

    data: training and validation images of ten classes, which are coloured and captioned as digits.
    classifier: for the evaluation; by default that of MNIST. Raises UserError if it does not fit the data.
    """
    digits, validation_digits = data
    reference = reference_for(digits, classifier)
    run_dir = RunDir(LESSON, config, digits.name)
    tokenizer = train_tokenizer()
    torch.manual_seed(config.seed)
    network, diffusion, metadata = build_model(tokenizer)
    # NEW: some captions are dropped, and t is drawn more often where captions matter
    drop_fn = partial(drop_captions, probability=config.caption_dropout)
    loss = caption_loss(loss_hybrid_velocity, diffusion, drop_fn, sample_t=sample_noisy_timesteps)

    def sample(network: TextToImageNetwork, prompts: list[str], scale: float) -> Tensor:
        # NEW: guided, in few steps
        pipe = TextToImagePipeline(Model(network, diffusion, metadata), tokenizer)
        steps = config.dry_run_cap(config.sample_steps)
        return pipe(prompts, scale, steps, seed=config.seed, progress_bar=False).tensor

    def preview(network: TextToImageNetwork) -> Figure:
        return plot_grid(sample(network, PROMPTS * 4, MAIN_SCALE), column_labels=PROMPTS)

    network = train(
        network,
        loss,
        TokenizedDigits(digits, tokenizer),
        config,
        run=run_dir,
        validation=validation_batch(validation_digits, tokenizer, config.dry_run_cap(512)),
        metadata=metadata,
        preview=preview,
        lr_scales=LR_SCALES,
    )
    sweep(partial(sample, network), config.dry_run_cap(config.num_eval), run_dir, reference, classifier)
    return network


def sweep(
    sample: Callable[[list[str], float], Tensor],
    n: int,
    run_dir: RunDir,
    reference: Reference,
    classifier: DigitClassifier | None = None,
) -> None:
    """Draw and measure n samples at s = 3 and fewer at other scales; write sweep.png and metrics.json."""
    rows = []
    print("digit and colour are read from each sample; FID falls with n (fid_floor is that of n real digits)")
    for scale in SWEEP:
        prompts, digits, colours = balanced_prompts(n if scale == MAIN_SCALE else min(n, OTHER_SAMPLES))
        metrics = evaluate(sample(prompts, scale), reference, digits, colours, classifier)
        rows.append({"guidance_scale": scale, **metrics})
        print(format_metrics(rows[-1]), flush=True)
    images = torch.cat([sample(PROMPTS, scale) for scale in SWEEP])
    names = [f"s = {scale}" for scale in SWEEP]
    run_dir.finish({"sweep": rows}, "sweep.png", plot_grid(images, row_labels=names, column_labels=PROMPTS))
    example = f'--checkpoint {run_dir.folder} --prompt "a blue three" --guidance-scale {MAIN_SCALE}'
    print(f"try next: python lesson_05_cfg/sample.py {example}")


def main(config: Config) -> None:
    run(config, load_splits(config.dataset, config.data_dir))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
