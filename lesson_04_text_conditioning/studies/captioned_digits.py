"""What experiments on captioned digits share: their data and table, training, and samples of prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from jaxtyping import Float, Int
from torch import Tensor

from common.digits.captions import CAPTIONS, NUM_PHRASINGS, balanced_prompts, caption_index
from common.digits.evaluation import Reference, reference_for
from common.digits.mnist import Digits, load_splits
from common.protocols import Denoiser, Loss, Sampler, TextToImageNetwork, Tokenizer
from common.results.experiments import ExperimentConfig, open_table, sample_metrics, train_variant
from common.results.table import ResultsTable
from common.sampling import sample_batches
from common.training.config import DigitsConfig, TrainConfig
from common.training.train import Network
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.captioned_mnist import TokenizedDigits, train_tokenizer, validation_batch
from lesson_04_text_conditioning.model import IMAGE_SHAPE, LR_SCALES, build_model
from lesson_04_text_conditioning.tokenizer import CaptionTokenizer

NUM_VALIDATION = 512  # captioned digits in the validation loss
# (network, tokenizer, prompts) -> denoiser with one sample per prompt
PromptDenoiser: TypeAlias = Callable[[Any, Any, Sequence[str]], Denoiser]


@dataclass(frozen=True)
class Study:
    """What an experiment on captioned digits works with."""

    lesson: str
    config: ExperimentConfig
    table: ResultsTable
    splits: tuple[Digits, Digits]  # training and validation digits
    reference: Reference  # samples are compared with it
    tokenizer: CaptionTokenizer


def open_study(lesson: str, config: ExperimentConfig, weights_of: str | None = None) -> Study:
    """Load data and results table of an experiment.

    weights_of: the lesson whose pretrained weights are measured. Raises UserError if there is a table of
    other settings or weights.
    """
    table = open_table(lesson, config, weights_of)
    splits = load_splits(config.dataset, config.data_dir)
    return Study(lesson, config, table, splits, reference_for(splits[0]), train_tokenizer())


def untrained_network(study: Study) -> Any:
    """Return the network of lessons 4 and 5, an nn.Module, with weights drawn by the experiment's seed."""
    torch.manual_seed(study.config.seed)
    return build_model(study.tokenizer).network


def train_captioned(
    study: Study,
    variant: str,
    network: Network,
    loss: Loss,
    *,
    tokenizer: Tokenizer | None = None,
    lr_scales: dict[str, float] = LR_SCALES,
    config_class: type[TrainConfig] = DigitsConfig,
    **settings: Any,
) -> Network:
    """Train one variant on captioned digits and return its averaged network; resume it if it was interrupted.

    tokenizer: default is the study's. The other arguments are those of `train_variant`. Raises UserError.
    """
    digits, validation_digits = study.splits
    tokenizer = tokenizer or study.tokenizer
    return train_variant(
        study.lesson,
        study.config,
        variant,
        network,
        loss,
        TokenizedDigits(digits, tokenizer),
        validation_batch(validation_digits, tokenizer, NUM_VALIDATION),
        config_class=config_class,
        lr_scales=lr_scales,
        **settings,
    )


def sample_prompts(
    network: TextToImageNetwork,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    denoiser_for: PromptDenoiser,
    sampler: Sampler,
    steps: int,
    config: ExperimentConfig,
    process: GaussianDiffusion | None = None,
) -> Float[Tensor, "n c h w"]:
    """Draw one sample per prompt, with the experiment's seed and on its device.

    process: what the sampler visits; by default `steps` evenly spaced timesteps.
    """

    def make_denoiser(indices: Tensor) -> Denoiser:
        return denoiser_for(network, tokenizer, [prompts[i] for i in indices.tolist()])

    bound_sampler = partial(sampler, process or make_diffusion().respace_evenly(steps))
    return sample_batches(
        bound_sampler, make_denoiser, IMAGE_SHAPE, len(prompts), seed=config.seed, device=config.device
    )


def pair_prompts(pairs: Int[Tensor, "pairs 2"], n: int) -> tuple[list[str], Tensor, Tensor]:
    """Return n prompts for these pairs of digit and colour, with their digits and colour indices.

    All pairs and all phrasings are about equally frequent.
    """
    digits, colours = pairs[torch.arange(n) % len(pairs)].T
    phrasings = torch.arange(n) // len(pairs) % NUM_PHRASINGS
    return [CAPTIONS[i] for i in caption_index(digits, colours, phrasings)], digits, colours


def measure_prompts(sample: Callable[[list[str]], Tensor], n: int, reference: Reference) -> dict[str, Any]:
    """Return the metrics of n samples of prompts that name every digit and colour equally often.

    sample: prompts -> samples.
    """
    prompts, digits, colours = balanced_prompts(n)
    return sample_metrics(sample(prompts), reference, digits, colours)
