"""The flags of lesson 6's train.py."""

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import arg

from common.cli import Fraction, PositiveFloat, PositiveInt, check_choice
from common.errors import UserError
from common.training.config import TrainConfig
from lesson_06_miniglide.model import TRAINABLE
from lesson_06_miniglide.networks.openai_glide import is_openai_file
from lesson_06_miniglide.networks.presets import OPENAI_PRESETS, PRESETS
from lesson_06_miniglide.training.distributed import PRECISIONS

# What --defaults stands for.
ORIGINAL: dict[str, Any] = {"preset": "report", "epochs": 100, "batch_size": 8, "grad_accum": 1}
ORIGINAL |= {"learning_rate": 1e-4, "optimizer": "adamw", "timesteps": 100}
NETWORK_FLAGS = ("num_channels", "num_head_channels", "num_res_block", "xf_width", "xf_layers", "xf_heads")
ORIGINAL |= dict.fromkeys(NETWORK_FLAGS)


@dataclass(frozen=True)
class Config(TrainConfig):
    """Lesson 6: train a text-to-image model of 64x64 pixels on your own images, or on rendered shapes."""

    # a folder of images with captions: the output of img2dataset (files, .tar or .parquet), Stanford Dogs, MS
    # COCO, Flickr8k, a metadata.jsonl or .csv, a .txt next to each image, or what save_to_disk or to_parquet
    # of Hugging Face wrote; default: rendered shapes
    data_dir: str | None = None
    # a data set of the Hugging Face Hub (pip install datasets), or a folder; in place of --data-dir
    dataset_name: str | None = None
    dataset_config_name: str | None = None  # which configuration of --dataset-name, if it has several
    image_column: str | None = None  # of the Hub, parquet, save_to_disk; default: image, jpg, png or webp
    caption_column: str | None = None  # of the same; default: text, caption or txt
    split: str = "train"  # of the same; of parquet, the files with this word in their names
    dogs: bool = False  # read --data-dir as Stanford Dogs, with the breed as the caption
    image_limit: PositiveInt | None = None  # number of images, the first that are readable (dogs: always all)
    resize: str = "squish"  # squish (to a square) or crop (the middle)
    # first crop each image to its bounding box in Annotation/ of --data-dir, as Stanford Dogs has it
    crop_to_box: bool = False
    # folder for the decoded images; default <data-dir>/.cache, or data/huggingface for --dataset-name
    cache_dir: str | None = None
    allow_broken: bool = False  # continue if more than 5 % of the images are broken
    flip: bool = True  # mirror photos at random; switch it off if captions tell left from right
    validation_fraction: Fraction = 0.02  # of the images, for the validation loss
    # folder with GPT-2's encoder.json and vocab.bpe; default: a BPE of the captions, or that of --init-from
    vocabulary: str | None = None

    # t5-small, or a folder: a frozen encoder in place of the text transformer, as in Imagen
    text_encoder: str | None = None
    # tiny, tiny_small, tiny_upsampler, tiny_inpainting, photos, report, glide or glide_upsampler
    preset: str = "tiny"
    # weights to start from: a run's folder or a .safetensors, whose missing input channels start at zero; or
    # OpenAI's base.pt with --preset glide, upsample.pt with --preset glide_upsampler
    init_from: Annotated[str | None, arg(aliases=["--start-from"])] = None
    # what is trained: all, unet (without the text encoder), or text (the text encoder and, of the UNet, only
    # the keys and values of the tokens)
    train: str = "all"
    num_channels: PositiveInt | None = None  # of the UNet; a multiple of --num-head-channels (tiny: of 24)
    num_head_channels: PositiveInt | None = None  # channels per attention head
    num_res_block: PositiveInt | None = None  # residual blocks per resolution
    xf_width: PositiveInt | None = None  # width of the text transformer
    xf_layers: PositiveInt | None = None  # layers of the text transformer
    xf_heads: PositiveInt | None = None  # attention heads of the text transformer
    timesteps: PositiveInt = 1000  # of the diffusion process; sampling may use fewer
    # the original's settings, whatever else is given: report, 100 epochs, batch 8, rate 1e-4, T = 100
    defaults: bool = False

    batch_size: Annotated[
        PositiveInt | None, arg(help="images per process and batch; default: the preset's")
    ] = None  # type: ignore[assignment]
    grad_accum: PositiveInt = 1  # batches per optimizer step
    learning_rate: Annotated[
        PositiveFloat | None, arg(help="peak value, after a warm-up; default: the preset's")
    ] = None  # type: ignore[assignment]
    optimizer: Annotated[
        Literal["adamw", "muon"] | None, arg(help="adamw or muon; default: the preset's")
    ] = None  # type: ignore[assignment]
    ema_decay: Fraction = 0.999  # of the averaged weights, reached after a warm-up
    epochs: PositiveInt | None = None  # passes over the images
    # fraction of captions replaced by the empty one, for guidance
    caption_dropout: Annotated[Fraction, arg(aliases=["--drop-caption"])] = 0.2
    no_vlb: bool = False  # train with L_simple and a fixed variance
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where it is fast
    activation_checkpointing: bool = False  # needs less memory and up to a third more time
    compile: bool = False  # torch.compile the network: minutes at the start, then faster steps

    checkpoint_time: PositiveFloat = 1800.0  # seconds between checkpoints
    checkpoint_every: Annotated[
        PositiveInt | None, arg(help="steps between checkpoints, if the clock alone is not enough")
    ] = None  # type: ignore[assignment]
    delcheck: bool = False  # keep only the latest three checkpoints
    sample_every: PositiveInt = 1000  # steps between previews
    # captions of the previews; can be repeated; default: the six most frequent
    preview_prompt: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, arg(aliases=["--caption"])] = ()
    # a run's folder, or one of its checkpoints, to continue from
    resume: Annotated[str | None, arg(aliases=["--continue-train"])] = None
    # the run's folder, with checkpoints/ in it; default runs/lesson_06_miniglide/<time>
    out: Annotated[str | None, arg(aliases=["--checkpoint-dir"])] = None

    immutable_on_resume = (*TrainConfig.immutable_on_resume, "preset", "timesteps", "no_vlb", *NETWORK_FLAGS)
    immutable_on_resume += ("text_encoder", "resize", "crop_to_box", "flip", "validation_fraction", "train")
    default_steps = 2500
    default_minutes = 120.0  # for slow machines; with fast bf16 two cores need 45


def resolved(config: Config) -> Config:
    """Return the configuration with --defaults and the preset's values filled in. Raises UserError."""
    check_choice("--preset", config.preset, PRESETS)
    check_choice("--precision", config.precision, PRECISIONS)
    check_choice("--train", config.train, TRAINABLE)
    config = replace(config, **ORIGINAL) if config.defaults else config
    if config.init_from and not config.resume:
        check_init_from(config)
    if config.text_encoder and (config.xf_layers or config.xf_heads):
        raise UserError("--xf-layers and --xf-heads have no effect with --text-encoder; leave them out")
    preset = PRESETS[config.preset]
    return replace(
        config,
        learning_rate=config.learning_rate or preset.learning_rate,
        batch_size=config.batch_size or preset.batch_size,
        optimizer=config.optimizer or preset.optimizer,
    )


def check_init_from(config: Config) -> None:
    """Raise UserError if --init-from and other flags do not fit together."""
    path = config.init_from
    if not is_openai_file(path):
        if config.text_encoder or config.vocabulary:
            raise UserError("--init-from brings its own tokenizer; leave out --text-encoder and --vocabulary")
        return
    names = " or ".join(OPENAI_PRESETS)
    if config.preset not in OPENAI_PRESETS:
        hint = "of a run, name the folder or a .safetensors"
        raise UserError(f"--init-from {path}: a .pt file is OpenAI's and needs --preset {names}; {hint}")
    if config.text_encoder:
        raise UserError(f"--init-from {path} has its own text encoder; leave out --text-encoder")
    if not config.vocabulary:
        raise UserError(
            f"--init-from {path} needs --vocabulary, a folder with GPT-2's encoder.json and vocab.bpe"
        )
    if config.timesteps != 1000:
        raise UserError(f"--init-from {path} was trained with 1000 timesteps; leave out --timesteps")
    if config.no_vlb:
        raise UserError(f"--init-from {path} learned its variance; leave out --no-vlb")
