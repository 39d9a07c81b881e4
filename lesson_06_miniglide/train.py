"""Lesson 6: train miniGLIDE (any images with captions), dogGLIDE (--dogs), or shapes drawn by the program.

python lesson_06_miniglide/train.py --data-dir ../shared/data/stanford_dogs_mini --dogs --time-limit 90
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from tyro.conf import arg

from common.command import UserError, check_choice, pick_device, run_command
from common.pictures import label_grid
from common.runs import Run, find_state, load_weights, saved_config
from common.ship import results_of
from common.training import TrainConfig
from lesson_05_cfg.guidance import drop_captions, loss_of_captions
from lesson_06_miniglide.big_trainer import PRECISIONS, BigTrainer, first_alone, join_processes
from lesson_06_miniglide.captioned_images import load_images, make_tokenizer
from lesson_06_miniglide.generate import LESSON, Generator, reader_of
from lesson_06_miniglide.inpainting import widened
from lesson_06_miniglide.outside_text import FrozenEncoder, KeptStates
from lesson_06_miniglide.presets import PRESETS, new_diffusion, new_network, settings_of
from lesson_06_miniglide.sketch import learn_to_sketch

SCALES = (1, 3, 6)  # of guidance, of the pictures along the way
# What --defaults stands for.
ORIGINAL = {"preset": "report", "epochs": 100, "batch_size": 8, "grad_accum": 1, "learning_rate": 1e-4}
ORIGINAL |= {"optimizer": "adamw", "timesteps": 100}
NETWORK_FLAGS = ("num_channels", "num_head_channels", "num_res_block", "xf_width", "xf_layers", "xf_heads")
ORIGINAL |= dict.fromkeys(NETWORK_FLAGS)


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
    flip: bool = True  # mirror photos at random; not for captions that tell left from right
    validation_fraction: float = 0.02  # of the images, for the validation loss
    vocabulary: str | None = None  # folder of GPT-2's encoder.json, vocab.bpe; default: a BPE of the captions

    # t5-small or a folder: a frozen encoder in the place of the text transformer, as in Imagen
    text_encoder: str | None = None
    preset: str = "tiny"  # tiny, tiny_small, tiny_upsampler, tiny_inpainting, report or glide
    start_from: str | None = None  # weights to begin with; inputs that they do not know start at zero
    num_channels: int | None = None  # of the UNet; a multiple of --num-head-channels (tiny: of 24)
    num_head_channels: int | None = None  # width of an attention head
    num_res_block: int | None = None  # residual blocks at each resolution
    xf_width: int | None = None  # of the text transformer
    xf_layers: int | None = None
    xf_heads: int | None = None
    timesteps: int = 1000  # of the diffusion process; sampling takes as few as it likes
    # the original's settings, whatever else is given: report, 100 epochs, batch 8, rate 1e-4, T = 100
    defaults: bool = False

    batch_size: int | None = None  # images at a time in each process; default: of tiny 128, of the others 32
    grad_accum: int = 1  # so many batches a step
    # the highest; default: of tiny 6e-3 (small and upsampler 3e-3, to inpaint 2e-3), of the others 1e-4
    learning_rate: float | None = None
    optimizer: Literal["adamw", "muon"] | None = None  # default: muon for tiny and tiny_inpainting
    ema_decay: float = 0.999  # of the averaged weights, reached after a warm-up
    epochs: int | None = None  # train so many passes over the images
    drop_caption: float = 0.2  # share of captions replaced by the empty one, for guidance
    no_vlb: bool = False  # L_simple alone, fixed variance
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware is fast at it
    activation_checkpointing: bool = False  # less memory, up to a third more time
    compile: bool = False  # torch.compile the network: minutes first, then faster steps

    checkpoint_time: float = 1800.0  # seconds between checkpoints
    checkpoint_every: int | None = None  # steps between checkpoints
    delcheck: bool = False  # keep only the newest three checkpoints
    sample_every: int = 1000  # steps between pictures
    # of the pictures; can be given several times; default: the six most frequent
    caption: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    # a run's folder or one of its checkpoints, to go on where it stopped
    resume: Annotated[str | None, arg(aliases=["--continue-train"])] = None
    # the run's folder, with checkpoints/ in it; default runs/lesson_06_miniglide/<time>
    out: Annotated[str | None, arg(aliases=["--checkpoint-dir"])] = None

    fixed = ("preset", "timesteps", "no_vlb", "text_encoder", "resize", "flip", *NETWORK_FLAGS)
    default_minutes = 45.0
    default_steps = 100_000


def resolved(config):
    """The configuration with what --defaults and the preset say about it. Raises UserError."""
    check_choice("--preset", config.preset, PRESETS)
    check_choice("--precision", config.precision, PRECISIONS)
    config = replace(config, **ORIGINAL) if config.defaults else config
    if config.text_encoder and (config.xf_layers or config.xf_heads):
        raise UserError("--xf-layers and --xf-heads do nothing beside --text-encoder; leave them out")
    preset = PRESETS[config.preset]
    return replace(
        config,
        learning_rate=config.learning_rate or preset.learning_rate,
        batch_size=config.batch_size or preset.batch_size,
        optimizer=config.optimizer or preset.optimizer,
    )


def earlier_weights(config):
    """(weights, facts) of the run that goes on, or of the one to begin with; (None, None) of a new one."""
    if config.resume:
        return load_weights(find_state(config.resume).with_suffix(".safetensors"), LESSON)
    if config.start_from and (config.text_encoder or config.vocabulary):
        raise UserError("--start-from brings what reads its captions; leave out --text-encoder, --vocabulary")
    return load_weights(config.start_from, LESSON, "--start-from") if config.start_from else (None, None)


def new_reader(config, images, text_settings):
    """What turns captions into what the network reads."""
    if config.text_encoder:
        return FrozenEncoder(config.text_encoder, text_settings.context)
    return make_tokenizer(images.captions, text_settings, config.vocabulary)


def kept_states(config, encoder):
    """The encoder's states of the data set's captions go where its images go; those of shapes nowhere."""
    folder = config.cache_dir or (Path(config.data_dir) / ".cache" if config.data_dir else None)
    return KeptStates(encoder, folder) if folder else encoder


def begin_with(network, weights, flag):
    try:
        network.load_state_dict(widened(weights, network))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{flag}: its network is another than this preset's ({reason})") from None


def shipped_curve(config):
    """metrics.csv of the shipped run whose loss this one's can be compared with, or None."""
    if config.preset != "tiny" or config.no_vlb or (config.data_dir and not config.dogs):
        return None
    return results_of(LESSON, "dogs" if config.dogs else None) / "metrics.csv"


def main(config):
    config = resolved(config)
    network_settings, text_settings = settings_of(config)
    rank, world = join_processes(config.device)
    images = first_alone(load_images, config)
    earlier, facts = earlier_weights(config)
    reader = reader_of(facts) if facts else new_reader(config, images, text_settings)
    if outside := isinstance(reader, FrozenEncoder):
        text_settings, kept = reader.config(text_settings.width), kept_states(config, reader)
    else:
        text_settings, kept = replace(text_settings, vocab_size=reader.vocab_size), reader
    images, held_back = first_alone(images.tokenized, kept).split(config.validation_fraction)

    torch.manual_seed(config.seed)
    diffusion = new_diffusion(config.timesteps, config.preset)
    network = new_network(config.preset, network_settings, text_settings, diffusion.alpha_bar)
    if earlier and not config.resume:
        begin_with(network, earlier, f"--start-from {config.start_from}")
    name, keep = f"{images.name}, {len(images)} images", 3 if config.delcheck else None
    run = Run(LESSON, config, name, keep) if rank == 0 else None
    if run:
        run.reference = shipped_curve(config)

    preset, count = PRESETS[config.preset], len(config.caption) or 6
    if preset.sketching and not earlier:
        steps = config.at_most(min(preset.sketching, config.steps or preset.sketching))
        learn_to_sketch(network.to(pick_device(config.device)), images, steps, config.seed, quiet=rank > 0)
    examples = held_back if len(held_back) >= count else images
    example, seen = preset.task(diffusion, network, examples.first(count)[0])
    theirs = examples.captions_of(torch.arange(len(example))) if seen else images.most_frequent(6)
    prompts = list(config.caption) or theirs
    facts = {"network": asdict(network_settings), "text": asdict(text_settings)}
    facts |= {"prompts": prompts} | ({} if outside else {"tokenizer": reader.to_json()})
    hybrid, simple = preset.losses
    drop = partial(drop_captions, probability=config.drop_caption)
    loss = loss_of_captions(simple if config.no_vlb else hybrid, diffusion, drop, preset.task)

    def pictures(network):
        generator, steps = Generator(network, diffusion, reader), config.at_most(min(20, config.timesteps))
        rows = {f"s = {scale}": generator.draw(prompts, scale, config, steps, **seen) for scale in SCALES}
        if seen:
            rows = {"sees": network.picture_of(**seen)} | rows | {"was": example}
        images = torch.cat(list(rows.values()))
        return label_grid(images, len(prompts), row_labels=list(rows), column_labels=prompts)

    if config.epochs:
        epoch = len(images) / (config.batch_size * config.grad_accum * world)
        config = replace(config, steps=min(config.steps or math.inf, math.ceil(config.epochs * epoch)))
    validation = held_back.first(256) if len(held_back) else None
    trainer = BigTrainer(network, loss, images, config, run, validation, facts, pictures, rank, world)
    network = trainer.train()
    if run:
        numbers = {"steps": trainer.step, "images": len(images), "captions_cut": images.cut}
        numbers["best_validation_loss"] = trainer.best if validation else None
        run.finish(numbers, "samples.png", pictures(network))


if __name__ == "__main__":
    run_command(main, Config, saved_config)
