"""What the experiments.py of all lessons share: flags, results tables, and resumable training runs."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import tyro
from jaxtyping import Float, Int
from matplotlib.figure import Figure
from torch import Tensor

from common.cli import PositiveInt, SampleCount, Seed, check_choice
from common.digits.evaluation import Reference, evaluate
from common.errors import UserError
from common.files import ROOT, make_folder, read_json, write_atomically
from common.plotting import plot_curves, plot_rows
from common.protocols import Dataset, Loss, Metadata
from common.results.table import ResultsTable, describe_difference
from common.training.checkpoints import pretrained_path
from common.training.config import TrainConfig
from common.training.metrics_csv import read_metrics
from common.training.run_dir import RunDir
from common.training.train import Network, train

# Settings that may differ between two calls that fill one table.
FREE_SETTINGS = ("seed", "data_dir", "device", "out")
# Settings of a training run that do not change its result.
FREE_TRAIN_SETTINGS = ("device", "out", "resume", "data_dir", "cache_dir")


@dataclass(frozen=True)
class ExperimentConfig:
    """Settings of an experiment."""

    name: tyro.conf.Positional[str]  # one of the experiments above
    steps: PositiveInt | None = None  # training steps per variant; default 4000 (10 minutes), for some less
    num_samples: SampleCount = 2000  # measured per row, up to 100 steps per sample; half as many above that
    dataset: str = "auto"  # auto (MNIST if available, else synthetic digits), mnist or synthetic
    data_dir: str | None = None  # the folder above MNIST/raw
    seed: Seed = 0  # another seed adds rows to the same table
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str | None = None  # folder for NAME.json and NAME.png; default: the lesson's results/

    def samples_at(self, steps: int) -> int:
        """Return how many samples are measured with this many sampling steps."""
        return self.num_samples if steps <= 100 else max(2, self.num_samples // 2)


def run_experiment(experiments: Mapping[str, Callable[[Any], None]], config: ExperimentConfig) -> None:
    """Run the experiment that the command line names. Raises UserError if there is none of that name."""
    check_choice("experiment", config.name, experiments)
    experiments[config.name](config)


def by_name(functions: Iterable[Callable]) -> dict[str, Callable]:
    """Return a dict from the names of functions to the functions."""
    return {f.__name__: f for f in functions}


def with_default_steps(config: Any, steps: int = 4000) -> Any:
    """Return the configuration with `steps` training steps, if the command line names none."""
    return replace(config, steps=config.steps or steps)


def open_table(lesson: str, config: ExperimentConfig, weights_of: str | None = None) -> ResultsTable:
    """Return the results table of an experiment, NAME.json.

    weights_of: the lesson whose pretrained weights are measured; other weights need another table. Raises
    UserError if there is a table of other settings or weights.
    """
    folder = Path(config.out or ROOT / lesson / "results")
    make_folder(folder, "--out")
    settings = {k: v for k, v in asdict(config).items() if k not in FREE_SETTINGS}
    if weights_of:
        settings["weights"] = sha256(pretrained_path(weights_of).read_bytes()).hexdigest()[:16]
    return ResultsTable(folder / f"{config.name}.json", settings, config.device, config.seed)


def run_folder(lesson: str, config: ExperimentConfig, variant: str = "", group: str | None = None) -> Path:
    """Return the folder of a variant's training run.

    group: the name under which several experiments share training runs; default: the experiment's own.
    """
    name = f"{group or config.name}_steps{config.steps}_seed{config.seed}"
    return Path("runs/experiments") / lesson / name / variant


def has_checkpoint(folder: Path) -> bool:
    """Return whether a training run in this folder could be resumed."""
    return any(folder.glob("checkpoints/step_*.pt"))


def train_variant(
    lesson: str,
    config: ExperimentConfig,
    variant: str,
    network: Network,
    loss: Loss,
    data: Dataset,
    validation: tuple[Tensor, ...],
    *,
    group: str | None = None,
    config_class: type[TrainConfig] = TrainConfig,
    preview: Callable[[Any], Figure] | None = None,
    metadata: Metadata | None = None,
    lr_scales: Mapping[str, float] | None = None,
    **settings: Any,
) -> Network:
    """Train one variant of an experiment and return its averaged network; resume it if it was interrupted.

    settings: of `config_class`; steps, seed and device are the experiment's unless given. The other arguments
    are those of `run_folder` and `train`. Raises UserError if the folder has a run with other settings.
    """
    folder = run_folder(lesson, config, variant, group)
    settings = {"steps": config.steps, "seed": config.seed, "device": config.device} | settings
    train_config = config_class(out=str(folder), **settings)
    if has_checkpoint(folder):
        refuse_other_settings(folder, train_config, data)
        train_config = replace(train_config, resume=str(folder))
    run = RunDir(lesson, train_config, data.name, resume_command="the same command again")
    return train(
        network,
        loss,
        data,
        train_config,
        run=run,
        validation=validation,
        metadata=metadata,
        preview=preview,
        lr_scales=lr_scales,
    )


def refuse_other_settings(folder: Path, config: TrainConfig, data: Dataset) -> None:
    """Raise UserError if the run in a folder is not the one that is asked for."""
    now = json.loads(json.dumps(asdict(config) | {"data": data.name}))  # with lists for tuples
    for name in FREE_TRAIN_SETTINGS:
        now.pop(name, None)
    saved = read_json(folder / "config.json")
    if change := describe_difference(saved["config"] | {"data": saved["data"]}, now):
        raise UserError(f"{folder} holds a training run with other settings ({change}); move it away")


def sample_metrics(
    samples: Float[Tensor, "n c h w"],
    reference: Reference,
    digits: Int[Tensor, "n"] | None = None,
    colours: Int[Tensor, "n"] | None = None,
) -> dict[str, Any]:
    """Return the metrics that results tables hold. digits, colours: what was requested, if anything."""
    metrics = evaluate(samples, reference, digits, colours)
    left_out = ("reference", "confident_real") + (("diversity",) if digits is None else ())
    return {name: value for name, value in metrics.items() if name not in left_out}


def save_figure(table: ResultsTable, figure: Figure, suffix: str = "") -> None:
    """Write NAME.png next to a table; with a suffix such as _loss, NAME_loss.png."""
    path = table.path.with_name(f"{table.path.stem}{suffix}.png")
    write_atomically(path, figure.savefig)
    print(f"look at {path}; numbers are in {table.path.name} next to it")


def save_image_rows(
    table: ResultsTable, rows: Mapping[str, Tensor], suffix: str = "", scale: float = 1.2, **grid_kwargs: Any
) -> None:
    """Write a figure of labelled rows of images. rows: name -> [N, C, H, W], with the same N in all."""
    save_figure(table, plot_rows(rows, scale, **grid_kwargs), suffix)


def save_losses(table: ResultsTable, folders: Mapping[str, Path]) -> None:
    """Write NAME_loss.png, the training losses of several runs as means over 50 steps."""
    curves = {}
    for name, folder in folders.items():
        rows = read_metrics(folder / "metrics.csv")
        groups = [rows[i : i + 50] for i in range(0, len(rows), 50)]
        curves[name] = [(g[-1]["step"], sum(row["loss"] for row in g) / len(g)) for g in groups]
    save_figure(table, plot_curves(curves, "step", "loss"), "_loss")
