"""Training with everything that a lesson's script needs: the loop, and a folder in which it is recorded."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from matplotlib.figure import Figure
from torch import Tensor, nn

from common.protocols import Dataset, Loss, Metadata
from common.training.config import TrainConfig
from common.training.run_dir import Recorder, RunDir
from common.training.trainer import Trainer

Network = TypeVar("Network", bound=nn.Module)


def train(
    network: Network,
    loss: Loss,
    data: Dataset,
    config: TrainConfig,
    *,
    run: RunDir | None = None,
    validation: tuple[Tensor, ...] | None = None,
    metadata: Metadata | None = None,
    preview: Callable[[Any], Figure] | None = None,
    lr_scales: Mapping[str, float] | None = None,
) -> Network:
    """Train `network` within the budget of `config` and return its averaged weights as a network.

    run: a `RunDir` in which everything is written; None writes nothing. metadata: saved with the weights.
    preview: averaged network -> matplotlib figure, saved at every checkpoint. The rest as in `Trainer`.
    Raises UserError, naming the last good checkpoint, when the loss or its gradient is not finite.
    """
    callbacks = [Recorder(run, metadata or {}, preview)] if run else []
    trainer = Trainer(
        network,
        loss,
        data,
        config,
        validation=validation,
        lr_scales=lr_scales,
        state=run.state if run else None,
        callbacks=callbacks,
    )
    return cast(Network, trainer.fit())
