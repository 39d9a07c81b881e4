"""The flags of every training script."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from common.cli import Fraction, PositiveFloat, PositiveInt, Seed
from common.errors import UserError


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run; training stops at --steps or --time-limit, whichever comes first."""

    steps: PositiveInt | None = None  # optimizer steps; without --steps and --time-limit: the lesson's budget
    # minutes of training; the learning rate decays with the time used
    time_limit: PositiveFloat | None = None
    batch_size: PositiveInt = 64  # images per step
    learning_rate: PositiveFloat = 7e-4  # peak value, after a linear warm-up and before a cosine decay
    # muon makes more progress per step, at a slightly higher cost
    optimizer: Literal["adamw", "muon"] = "adamw"
    ema_decay: Fraction = 0.995  # of the averaged weights, reached after a warm-up
    seed: Seed = 0  # of weights, batches, noise and samples
    device: str = "auto"  # auto, cpu, cuda or mps
    checkpoint_every: PositiveInt = 500  # steps between checkpoints
    resume: str | None = None  # a run's folder, or one of its checkpoints, to continue from
    out: str | None = None  # the run's folder; default runs/<lesson>/<time>
    dry_run: bool = False  # two steps of everything, to check that it works

    # fields that a resumed run may not change
    immutable_on_resume: ClassVar[tuple[str, ...]] = ("optimizer",)
    default_steps: ClassVar[int] = 4000
    default_minutes: ClassVar[float] = 10.0

    def progress(self, step: int, minutes: float) -> float:
        """Return the fraction of the budget that is used, from 0 to 1."""
        steps, limit = self.steps, self.time_limit
        if steps is None and limit is None:
            steps, limit = self.default_steps, self.default_minutes
        if self.dry_run:
            steps, limit = 2, None
        return min(1.0, max(step / steps if steps else 0, minutes / limit if limit else 0))

    def dry_run_cap(self, n: int) -> int:
        """Return n, but at most 2 in a dry run."""
        return min(n, 2) if self.dry_run else n


@dataclass(frozen=True)
class DigitsConfig(TrainConfig):
    """Settings of lessons 1 to 5, which share one optimizer and batch size."""

    batch_size: PositiveInt = 32  # images per step
    learning_rate: PositiveFloat = 4e-3  # peak value, after a linear warm-up and before a cosine decay
    optimizer: Literal["adamw", "muon"] = "muon"  # adamw needs a batch of 64 and a learning rate of 1.5e-3
    dataset: str = "auto"  # auto (MNIST if available, else synthetic digits), mnist or synthetic
    data_dir: str | None = None  # the folder above MNIST/raw; default $LESSONS_DATA, else a download to data/


def config_from_dict(config_type: type, values: dict[str, Any]) -> Any:
    """Build a configuration dataclass from its JSON form, in which tuples are lists.

    Raises UserError for fields that this version does not have, as those of a newer version.
    """
    known = {field.name for field in fields(config_type)}
    if unknown := sorted(values.keys() - known):
        raise UserError(f"written by a newer version, whose settings are unknown here: {', '.join(unknown)}")
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
