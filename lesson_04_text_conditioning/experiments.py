"""Measure lesson 4: python lesson_04_text_conditioning/experiments.py NAME

NAME is one of
    class_or_caption  the same network conditioned on the index of a pair, or on a caption
    readers           the caption as one vector, among the keys and values, or both
    held_out          held-out pairs of digit and colour against pairs from training
    wordings          other words and other orders than in training
    attention         which pixels attend to which token along the trajectory
    targets           predicted noise against predicted velocity, started at two timesteps
    x_0_error         the error of both networks' predicted x_0
    mistakes          the classic bugs, each trained next to the right version

Each writes results/NAME.json and NAME.png. An interrupted experiment continues with the missing rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from common.cli import run_command
from common.digits.captions import COLOURS, WORDS, balanced_prompts, held_out_mask
from common.plotting import evenly_spaced, plot_grid
from common.protocols import TextToImageNetwork, Tokenizer
from common.results.experiments import (
    ExperimentConfig,
    by_name,
    run_experiment,
    run_folder,
    sample_metrics,
    save_figure,
    save_image_rows,
    save_losses,
    with_default_steps,
)
from lesson_01_ddpm.diffusion import GaussianDiffusion
from lesson_02_improved_ddpm.ddim import SAMPLERS
from lesson_02_improved_ddpm.model import make_diffusion
from lesson_04_text_conditioning.captioned_mnist import PROMPTS
from lesson_04_text_conditioning.model import LESSON, LR_SCALES, UNET_CONFIG, load, tokenizer_from_metadata
from lesson_04_text_conditioning.studies import targets as target_study
from lesson_04_text_conditioning.studies.attention_maps import record_attention
from lesson_04_text_conditioning.studies.captioned_digits import (
    Study,
    measure_prompts,
    open_study,
    pair_prompts,
    sample_prompts,
    train_captioned,
    untrained_network,
)
from lesson_04_text_conditioning.studies.figures import plot_x_0_errors
from lesson_04_text_conditioning.studies.mistakes import loss_with_inverted_mask, loss_with_random_padding
from lesson_04_text_conditioning.studies.text_ablations import (
    PairIndices,
    TextFilter,
    conditional_denoiser,
    loss_with_text,
    pooled_only,
    tokens_only,
    whole_text,
)
from lesson_04_text_conditioning.studies.wordings import WORDINGS
from lesson_04_text_conditioning.text_transformer import TextConfig
from lesson_04_text_conditioning.text_unet import TextUNet
from lesson_04_text_conditioning.velocity import VelocityPrediction, loss_hybrid_velocity

SHOWN_STEPS = 25  # of DDIM, for samples that are compared
COLUMN_TITLES = {"told": "conditioned on", "network_sees": "network sees"}


@dataclass(frozen=True)
class Config(ExperimentConfig):
    __doc__ = __doc__


def sample(
    network: TextToImageNetwork,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    config: Config,
    text_filter: TextFilter = whole_text,
    process: GaussianDiffusion | None = None,
) -> Float[Tensor, "n c h w"]:
    """Draw one sample per prompt with DDIM."""
    denoiser_for, ddim = partial(conditional_denoiser, text_filter=text_filter), SAMPLERS["ddim"]
    return sample_prompts(network, tokenizer, prompts, denoiser_for, ddim, SHOWN_STEPS, config, process)


def compare(study: Study, column: str, draws: Mapping[str, Callable[[list[str]], Tensor]]) -> None:
    """Measure several ways to draw samples of prompts, and show samples of each.

    column: of the results table. draws: value in that column -> (prompts -> samples).
    """
    for name, draw in draws.items():
        measure = partial(measure_prompts, draw, study.config.num_samples, study.reference)
        study.table.row(measure, **{column: name})
    save_image_rows(study.table, {name: draw(PROMPTS) for name, draw in draws.items()})


# -- experiments with training -------------------------------------------------------------------------------


def class_or_caption(config: Config) -> None:
    """Compare a caption with the index of what it says, at equal training steps."""
    config = with_default_steps(config, 2000)
    study, pairs = open_study(LESSON, config), PairIndices()
    torch.manual_seed(config.seed)
    table_config = TextConfig(pairs.vocab_size, pairs.context_length, layers=0)
    class_network = VelocityPrediction(TextUNet(UNET_CONFIG, table_config), make_diffusion().alpha_bar)
    train = partial(train_captioned, study, loss=loss_with_text(loss_hybrid_velocity), group="told")
    by_caption = train("both", untrained_network(study))
    # a table of classes may learn as fast as all other parameters
    by_class = train("class", class_network, tokenizer=pairs, lr_scales={})
    draws = {
        "caption": partial(sample, by_caption, study.tokenizer, config=config),
        "class": partial(sample, by_class, pairs, config=config),
    }
    compare(study, "told", draws)


def readers(config: Config) -> None:
    """Compare the two ways in which GLIDE gives a caption to the UNet, alone and together."""
    config = with_default_steps(config, 2000)
    study, draws = open_study(LESSON, config), {}
    for name, text_filter in {"both": whole_text, "vector": pooled_only, "attention": tokens_only}.items():
        loss = loss_with_text(loss_hybrid_velocity, text_filter)
        network = train_captioned(study, name, untrained_network(study), loss, group="told")
        draws[name] = partial(sample, network, study.tokenizer, config=config, text_filter=text_filter)
    compare(study, "network_sees", draws)


def targets(config: Config) -> None:
    """Compare predicted noise with predicted velocity after few steps, and two first timesteps."""
    config = with_default_steps(config, 600)
    study, shown = open_study(LESSON, config), {}
    for name, network in target_study.target_networks(study).items():
        for start in (999, 949):
            process = target_study.process_from(start, SHOWN_STEPS)
            draw = partial(sample, network, study.tokenizer, config=config, process=process)
            measure = partial(measure_prompts, draw, config.num_samples, study.reference)
            study.table.row(measure, target=name, start=start)
            if start == 999:
                shown[f"predicted {name}"] = draw(PROMPTS)
    save_image_rows(study.table, shown, scale=2.6, column_labels=PROMPTS)


def x_0_error(config: Config) -> None:
    """Measure the error of the clipped x_0_hat of both networks of `targets`, and of mean images."""
    config = with_default_steps(config, 600)
    study = open_study(LESSON, config)
    networks = target_study.target_networks(study)
    for name, predict in target_study.predictions_of_x_0(networks, study).items():
        study.table.row(partial(target_study.measure_x_0_error, predict, study), predicted_by=name)
    save_figure(study.table, plot_x_0_errors(study.table.path))


def mistakes(config: Config) -> None:
    """Compare each bug with the right version, trained for as many steps."""
    config = with_default_steps(config, 1000)
    study = open_study(LESSON, config)
    right = loss_with_text(loss_hybrid_velocity)
    random_padding = partial(loss_with_random_padding, study.tokenizer.vocab_size)
    variants = {  # name -> network, loss, learning-rate multipliers
        "right": (untrained_network(study), right, LR_SCALES),
        "random padding": (untrained_network(study), random_padding, LR_SCALES),
        "mask inverted": (untrained_network(study), loss_with_inverted_mask, LR_SCALES),
        "text learns fast": (untrained_network(study), right, {}),
        "eps, not velocity": target_study.noise_variant(study),
    }
    draws = {}
    for name, (network, loss, lr_scales) in variants.items():
        network = train_captioned(study, name, network, loss, lr_scales=lr_scales)
        draws[name] = partial(sample, network, study.tokenizer, config=config)
    compare(study, "mistake", draws)
    save_losses(study.table, {name: run_folder(LESSON, config, name) for name in variants})


# -- experiments with the pretrained weights -----------------------------------------------------------------


def held_out(config: Config) -> None:
    """Test whether the network composes digit and colour, or has memorized pairs."""
    config = with_default_steps(config)
    study, model = open_study(LESSON, config, weights_of=LESSON), load(device=config.device)
    draw = partial(sample, model.network, tokenizer_from_metadata(model.metadata), config=config)

    def measure(pairs: Tensor) -> dict:
        prompts, digits, colours = pair_prompts(pairs, config.num_samples)
        return sample_metrics(draw(prompts), study.reference, digits, colours)

    unseen = held_out_mask().nonzero()
    for name, pairs in {"never shown": unseen, "shown": (~held_out_mask()).nonzero()}.items():
        study.table.row(partial(measure, pairs), pairs=name)
    prompts = [WORDINGS["trained"](COLOURS[colour], WORDS[digit]) for digit, colour in unseen.tolist()]
    save_figure(study.table, plot_grid(draw(prompts * 4), len(prompts), column_labels=prompts))


def wordings(config: Config) -> None:
    """Measure prompts that are worded differently from the captions of training."""
    config = with_default_steps(config)
    study, model = open_study(LESSON, config, weights_of=LESSON), load(device=config.device)
    draw = partial(sample, model.network, tokenizer_from_metadata(model.metadata), config=config)
    _, digits, colours = balanced_prompts(config.num_samples)

    def measure(prompts: list[str]) -> dict:
        return sample_metrics(draw(prompts), study.reference, digits, colours)

    shown = {}
    for name, wording in WORDINGS.items():
        prompts = [wording(COLOURS[c], WORDS[d]) for c, d in zip(colours.tolist(), digits.tolist())]
        study.table.row(partial(measure, prompts), wording=name, example=prompts[-1])
        shown[name] = draw(prompts[:10])
    save_image_rows(study.table, shown)


def attention(config: Config) -> None:
    """Show attention maps of a prompt: a row per step, a column per position of the caption."""
    config = with_default_steps(config)
    study, model = open_study(LESSON, config, weights_of=LESSON), load(device=config.device)
    tokenizer, prompt = tokenizer_from_metadata(model.metadata), "a red seven"
    with record_attention(model.network) as calls:
        sample(model.network, tokenizer, [prompt], config)
    maps = torch.stack(calls)[:, 0]  # [steps, L, 8, 8]

    words = [tokenizer.tokenizer.decode([i]).strip() for i in tokenizer.token_ids(prompt)]
    words += [f"padding {i}" for i in range(len(words), tokenizer.context_length)]
    half = len(maps) // 2
    early, late = maps[:half].mean((0, 2, 3)).tolist(), maps[half:].mean((0, 2, 3)).tolist()
    for i, word in enumerate(words):
        study.table.row(partial(dict, early=early[i], late=late[i]), token=word)
    chosen = torch.stack(evenly_spaced(list(maps), 8))
    chosen = F.interpolate(chosen / chosen.amax((1, 2, 3), keepdim=True), scale_factor=4)
    grid = plot_grid(2 * chosen.flatten(0, 1)[:, None] - 1, len(words), column_labels=words)
    save_figure(study.table, grid)


EXPERIMENTS = by_name(
    (class_or_caption, readers, targets, x_0_error, held_out, wordings, attention, mistakes)
)

if __name__ == "__main__":
    run_command(partial(run_experiment, EXPERIMENTS), Config)
