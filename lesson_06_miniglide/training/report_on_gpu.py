"""Lesson 6: the report's experiment on one GPU in 40 minutes, in pieces of ten.

    python -m lesson_06_miniglide.training.report_on_gpu --dogs DOGS --photos SBU_MINI --kinds

trains the report's network on Stanford Dogs and then on captioned photos, and measures samples of every
checkpoint. A call ends after --piece minutes. The same command continues where the last one stopped, and says
when everything is done.

    runs/report/dogs/, photos/     config.json, metrics.csv, loss.png, samples/, checkpoints/
    runs/report/dogs_evaluation/   samples of each checkpoint, and evaluation.json; photos_evaluation/

Keep what --keep copies (a few megabytes), and the weights of the best checkpoint: python -m
common.results.publish. With each checkpoint lies a training state of 1.5 GB, which only a resumed run needs.
"""

import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from common.cli import PositiveFloat, PositiveInt, check_choice, run_command
from common.errors import UserError
from common.files import make_folder
from lesson_06_miniglide.networks.presets import PRESETS

LESSON_FOLDER = Path(__file__).parent.parent
STOPPED = 128 + signal.SIGTERM  # exit status of a training run that saved its state and stopped


@dataclass(frozen=True)
class Config:
    """Lesson 6: train and measure the report's network on dogs, then on captioned photos."""

    dogs: str | None = None  # folder of Stanford Dogs; without it, only --photos
    photos: str | None = None  # folder of captioned photos; without it, only --dogs
    kinds: bool = False  # measure --photos by the kinds that captions name, as evaluate.py --kinds does
    crop_to_box: bool = False  # crop the dogs to the boxes in Annotation/
    cache_dir: str | None = None  # folder for the decoded images; default .cache in each folder
    piece: PositiveFloat = 10.0  # minutes of this call
    evaluation: PositiveFloat = 2.5  # of them, the last minutes, in which samples are drawn and measured
    training: PositiveFloat = 15.0  # minutes of training on each folder
    preset: str = "report"  # the network, as in train.py
    batch_size: PositiveInt = 128  # images per step
    learning_rate: PositiveFloat = 3e-4  # peak value, after a warm-up
    num_samples: PositiveInt = 500  # per checkpoint
    guidance_scale: PositiveFloat = 3.0  # of the samples that are measured
    out: str = "runs/report"  # folder for runs and evaluations
    keep: str | None = None  # folder that gets a copy of all numbers and images
    device: str = "auto"  # auto, cpu, cuda or mps
    dry_run: bool = False  # two steps of everything, to check that it works; without torch.compile


class Part(NamedTuple):
    """One training run and its evaluation. flags: of both; train and evaluate: of one of them."""

    folder: Path
    flags: Sequence[str]
    train: Sequence[str] = ()
    evaluate: Sequence[str] = ()

    @property
    def evaluation(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}_evaluation")

    @property
    def checkpoints(self) -> list[Path]:
        """The weights of each checkpoint, the earliest first."""
        return sorted(self.folder.glob("checkpoints/step_*.safetensors"))

    @property
    def is_trained(self) -> bool:
        return (self.folder / "metrics.json").exists()  # the last file that a training run writes


def parts_of(config: Config) -> list[Part]:
    """Return the runs in order, dogs first. Raises UserError if no folder is named."""
    parts, out = [], Path(config.out)
    cache = ["--cache-dir", config.cache_dir] if config.cache_dir else []
    if config.dogs:
        crop = ["--crop-to-box"] * config.crop_to_box
        parts.append(Part(out / "dogs", ["--data-dir", config.dogs, "--dogs", *crop, *cache]))
    if config.photos:
        train, evaluate = (["--validation-fraction", "0.1"], ["--kinds"]) if config.kinds else ([], [])
        parts.append(Part(out / "photos", ["--data-dir", config.photos, *cache], train, evaluate))
    if not parts:
        raise UserError("name --dogs or --photos, folders to train on")
    return parts


def train_command(part: Part, config: Config) -> list[str]:
    """Return the command that starts this part's training run or, if it has a checkpoint, continues it."""
    place = "--resume" if part.checkpoints else "--out"
    flags = ["--preset", config.preset, "--batch-size", config.batch_size, "--device", config.device]
    flags += ["--learning-rate", config.learning_rate, "--time-limit", config.training]
    flags += ["--checkpoint-time", 300, place, part.folder, *part.flags, *part.train]
    flags += ["--dry-run"] if config.dry_run else ["--compile"]
    return [sys.executable, str(LESSON_FOLDER / "train.py"), *map(str, flags)]


def evaluate_command(part: Part, config: Config) -> list[str]:
    """Return the command that measures all checkpoints; it reads the samples that are already drawn."""
    samples, steps = (4, 2) if config.dry_run else (config.num_samples, 50)
    flags = [*part.flags, *part.evaluate, "--num-samples", samples, "--steps", steps, "--sampler", "ddpm"]
    flags += ["--guidance-scale", config.guidance_scale, "--device", config.device, "--out", part.evaluation]
    for checkpoint in part.checkpoints:
        flags += ["--checkpoint", checkpoint]
    return [sys.executable, str(LESSON_FOLDER / "evaluate.py"), *map(str, flags)]


def run_until(command: Sequence[str], deadline: float) -> bool:
    """Run a command until the deadline (of time.monotonic) at the latest; return whether it finished.

    At the deadline it gets SIGTERM. If a command fails, this process exits with the same status.
    """
    with subprocess.Popen(command) as process:
        try:
            status = process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.terminate()  # train.py saves its state
            return False  # after the process has ended: `with` waits for it
    if status not in (0, STOPPED):
        sys.exit(status)
    return status == 0


def keep_results(parts: Sequence[Part], folder: Path) -> None:
    """Copy everything but weights and drawn samples."""
    for part in parts:
        for place in (part.folder, part.evaluation):
            for path in [*place.glob("*.*"), *place.glob("samples/*.png")]:
                target = folder / path.relative_to(part.folder.parent)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def main(config: Config) -> None:
    check_choice("--preset", config.preset, PRESETS)
    if config.evaluation >= config.piece:
        raise UserError(
            f"--evaluation {config.evaluation:g} leaves no time of --piece {config.piece:g} to train"
        )
    parts = parts_of(config)
    make_folder(config.out, "--out")
    started = time.monotonic()
    end_of_training = started + 60 * (config.piece - config.evaluation)
    end = started + 60 * config.piece
    done = True
    for part in parts:
        if not part.is_trained and time.monotonic() < end_of_training:
            run_until(train_command(part, config), end_of_training)
        measured = bool(part.checkpoints) and run_until(evaluate_command(part, config), end)
        done = done and part.is_trained and measured
    if config.keep:
        keep_results(parts, Path(config.keep))
    print("done" if done else "not done yet: the same command continues")


if __name__ == "__main__":
    run_command(main, Config)
