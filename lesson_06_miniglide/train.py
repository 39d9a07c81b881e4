"""Lesson 6: train miniGLIDE (any images with captions), dogGLIDE (--dogs), or shapes drawn by the program.

python lesson_06_miniglide/train.py --data-dir ../shared/data/stanford_dogs_mini --dogs --time-limit 90
"""

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Annotated

import torch
import tyro
from tyro.conf import arg

from common.command import check_choice, run_command
from common.pictures import label_grid
from common.runs import Run, saved_config
from common.training import TrainConfig
from lesson_01_ddpm.diffusion import loss_at_random_t, loss_simple
from lesson_02_improved_ddpm.variational_bound import loss_hybrid
from lesson_04_text_conditioning.velocity import loss_velocity, loss_velocity_simple
from lesson_05_cfg.guidance import drop_captions
from lesson_06_miniglide.big_trainer import PRECISIONS, BigTrainer, first_alone, join_processes
from lesson_06_miniglide.captioned_images import load_images, make_tokenizer
from lesson_06_miniglide.generate import LESSON, Generator
from lesson_06_miniglide.presets import PRESETS, new_diffusion, new_network, settings_of

SCALES = (1, 3, 6)  # of guidance, of the pictures along the way
# What --defaults stands for.
ORIGINAL = {"preset": "report", "epochs": 100, "batch_size": 8, "learning_rate": 1e-4, "timesteps": 100}


@dataclass(frozen=True)
class Config(TrainConfig):
    """Lesson 6: train a text-to-image model of 64x64 pixels on your own images, or on drawn shapes."""

    # a folder of images with captions: SBU as img2dataset writes it, Stanford Dogs, a metadata.jsonl or .csv,
    # or .txt beside the images; without it, drawn shapes
    data_dir: str | None = None
    dogs: bool = False  # take --data-dir as Stanford Dogs, a breed is a caption
    image_limit: int | None = None  # so many images, the first that are whole (dogs: always all)
    resize: str = "squish"  # to a square, or crop its middle
    cache_dir: str | None = None  # where the decoded images go; default <data-dir>/.cache
    allow_broken: bool = False  # go on when more than 5 % of the images are broken
    validation_fraction: float = 0.02  # of the images, for the validation loss
    vocabulary: str | None = (
        None  # a folder with GPT-2's encoder.json and vocab.bpe; default: a BPE of the captions
    )

    # -- network: a preset, and what differs from it
    preset: str = "tiny"  # tiny, report or glide
    num_channels: int | None = None  # of the UNet; a multiple of --num-head-channels
    num_head_channels: int | None = None  # width of an attention head
    num_res_block: int | None = None  # residual blocks at each resolution
    xf_width: int | None = None  # of the text transformer
    xf_layers: int | None = None
    xf_heads: int | None = None
    timesteps: int = 1000  # of the diffusion process; sampling takes as few as it likes
    defaults: bool = (
        False  # the original's settings, whatever else is given: report, 100 epochs, batch 8, T = 100
    )

    # -- training
    batch_size: int = 32  # images at a time in each process
    grad_accum: int = 1  # so many batches a step
    learning_rate: float | None = None  # the highest; default: of tiny 1e-3, of the others 1e-4
    ema_decay: float = 0.999  # of the averaged weights, reached after a warm-up
    epochs: int | None = None  # train so many passes over the images
    drop_caption: float = 0.2  # share of captions replaced by the empty one, for guidance
    no_vlb: bool = False  # L_simple alone, fixed variance
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware is fast at it
    activation_checkpointing: bool = False  # less memory, a third more time
    compile: bool = False  # torch.compile the network: minutes first, then faster steps

    # -- what is written
    checkpoint_time: float = 1800.0  # seconds between checkpoints
    checkpoint_every: int | None = None  # steps between checkpoints
    delcheck: bool = False  # keep only the newest three checkpoints
    sample_every: int = 1000  # steps between pictures
    caption: Annotated[
        tuple[str, ...], tyro.conf.UseAppendAction
    ] = ()  # of the pictures; can be given several times
    resume: Annotated[str | None, arg(aliases=["--continue-train"])] = None  # a run's folder or checkpoint
    out: Annotated[str | None, arg(aliases=["--checkpoint-dir"])] = (
        None  # the run's folder; default runs/<lesson>/<time>
    )

    default_minutes = 60.0
    default_steps = 100_000


def new_loss(config, diffusion):
    """(network, x_0, tokens, mask) -> [N]: L_hybrid, or L_simple with --no-vlb; of the velocity if tiny."""
    hybrid, simple = (
        (loss_velocity, loss_velocity_simple) if config.preset == "tiny" else (loss_hybrid, loss_simple)
    )
    at_t = simple if config.no_vlb else hybrid

    def loss(network, x_0, tokens, mask):
        text = network.encode_text(tokens, drop_captions(mask, config.drop_caption))
        return loss_at_random_t(at_t, diffusion, partial(network, text=text), x_0)

    return loss


def shown_prompts(images, config):
    """What the pictures along the way are of: --caption, else the most frequent captions."""
    counts = Counter(images.caption_of[images.rows].tolist())
    return list(config.caption) or [images.captions[i] for i, _ in counts.most_common(6)]


def main(config):
    check_choice("--preset", config.preset, PRESETS)
    check_choice("--precision", config.precision, PRECISIONS)
    config = replace(config, **ORIGINAL) if config.defaults else config
    if config.learning_rate is None:
        config = replace(config, learning_rate=1e-3 if config.preset == "tiny" else 1e-4)
    rank, world = join_processes()
    network_settings, text_settings = settings_of(config)
    images, held_back = first_alone(rank, world, load_images, config).split(config.validation_fraction)
    tokenizer = make_tokenizer(images.captions, text_settings, config.vocabulary)
    text_settings = replace(text_settings, vocab_size=tokenizer.vocab_size)
    images, held_back = images.tokenized(tokenizer), held_back.tokenized(tokenizer)
    data = f"{images.name}, {len(images)} images"
    run = Run(LESSON, config, data, keep=3 if config.delcheck else None) if rank == 0 else None

    torch.manual_seed(config.seed)
    diffusion = new_diffusion(config.timesteps)
    network = new_network(config.preset, network_settings, text_settings, diffusion.alpha_bar)
    facts = {"network": asdict(network_settings), "text": asdict(text_settings)}
    prompts = shown_prompts(images, config)
    facts |= {"tokenizer": tokenizer.to_json(), "prompts": prompts}

    def pictures(network):
        generator = Generator(network, diffusion, tokenizer)
        rows = [generator.draw(prompts, scale, config, config.at_most(20)) for scale in SCALES]
        names = [f"s = {scale}" for scale in SCALES]
        return label_grid(torch.cat(rows), len(prompts), row_labels=names, column_labels=prompts)

    if config.epochs:
        steps = math.ceil(config.epochs * len(images) / (config.batch_size * config.grad_accum * world))
        config = replace(config, steps=steps)
    validation = held_back.batch(torch.arange(min(256, len(held_back)))) if len(held_back) else None
    trainer = BigTrainer(
        network, new_loss(config, diffusion), images, config, run, validation, facts, pictures, rank, world
    )
    network = trainer.train()
    if run:
        best = trainer.best if validation else None
        numbers = {"steps": trainer.step, "images": len(images), "best_validation_loss": best}
        run.finish(numbers, "samples.png", pictures(network))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
