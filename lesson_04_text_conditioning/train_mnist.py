"""Lesson 4: coloured digits from captions.

python lesson_04_text_conditioning/train_mnist.py
"""

from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

from common.cli import SampleCount, run_command
from common.conditioning import select
from common.digits.captions import balanced_prompts
from common.digits.evaluation import evaluate, format_metrics, reference_for
from common.digits.mnist import Digits, load_splits
from common.plotting import plot_grid
from common.protocols import TextToImageNetwork
from common.sampling import sample_batches
from common.training.config import DigitsConfig
from common.training.run_dir import RunDir, saved_config
from common.training.train import train
from lesson_01_ddpm.diffusion import training_loss
from lesson_01_ddpm.model import SamplingSteps
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_04_text_conditioning.captioned_mnist import (
    PROMPTS,
    TokenizedDigits,
    train_tokenizer,
    validation_batch,
)
from lesson_04_text_conditioning.model import IMAGE_SHAPE, LESSON, LR_SCALES, build_model, encode_prompts
from lesson_04_text_conditioning.velocity import loss_hybrid_velocity


@dataclass(frozen=True)
class Config(DigitsConfig):
    """Lesson 4: train a text-to-image model of coloured digits."""

    sample_steps: SamplingSteps = 100  # ancestral steps per sample
    num_eval: SampleCount = 500  # samples that are measured

    default_minutes = 45.0  # for slow machines


def run(config: Config, data: tuple[Digits, Digits]) -> nn.Module:
    """Train on `data` (training and validation digits), measure, and return the averaged network."""
    digits, validation_digits = data
    run_dir = RunDir(LESSON, config, digits.name)
    reference = reference_for(digits)
    tokenizer = train_tokenizer()
    torch.manual_seed(config.seed)
    network, diffusion, metadata = build_model(tokenizer)

    def loss(network: TextToImageNetwork, x_0: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
        text = network.encode_text(tokens, mask)  # NEW: a caption instead of a class
        return training_loss(loss_hybrid_velocity, diffusion, partial(network, text=text), x_0)

    def sample(network: TextToImageNetwork, prompts: list[str], steps: int) -> Tensor:
        sampler = partial(SAMPLERS["ddpm"], diffusion.respace_evenly(config.dry_run_cap(steps)))
        text = encode_prompts(network, tokenizer, prompts)
        return sample_batches(
            sampler,
            lambda indices: partial(network, text=select(text, indices)),
            IMAGE_SHAPE,
            len(prompts),
            seed=config.seed,
            device=config.device,
        )

    def preview(network: TextToImageNetwork) -> Figure:
        return plot_grid(sample(network, PROMPTS * 4, 50), column_labels=PROMPTS)

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
    prompts, wanted_digits, wanted_colours = balanced_prompts(config.dry_run_cap(config.num_eval))
    samples = sample(network, prompts, config.sample_steps)
    metrics = evaluate(samples, reference, wanted_digits, wanted_colours)
    print(format_metrics(metrics))
    grid = sample(network, PROMPTS * config.dry_run_cap(8), config.sample_steps)
    run_dir.finish(metrics, "samples.png", plot_grid(grid, column_labels=PROMPTS))
    return network


def main(config: Config) -> None:
    run(config, load_splits(config.dataset, config.data_dir))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
