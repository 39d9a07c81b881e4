"""One training loop for every lesson. It knows nothing of diffusion: a network, a loss, batches, a budget.

All randomness of step i, including the order of the data, follows from (seed, i). A run that is killed and
resumed therefore continues bit for bit as if nothing had happened, and no generator state has to be saved.
This holds for a budget in steps and an equal number of threads. If the budget is in minutes, the learning
rate follows the clock, and no two runs are equal; other numbers of threads add in another order.
"""

import math
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn
from tqdm import tqdm

from common.device import autocast, keep_freed_memory, pick_device
from common.errors import UserError
from common.protocols import Dataset, Loss
from common.training.config import TrainConfig
from common.training.optim import EMA, OPTIMIZERS, learning_rate_factor, match_memory_format, parameter_groups
from common.training.stop_signals import StopSignals

Row = dict[str, Any]  # of metrics.csv


def batch_indices(step: int, num_examples: int, batch_size: int, seed: int) -> Int[Tensor, "{batch_size}"]:
    """Return the examples of batch `step`; every epoch is a random permutation of its own."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    indices = torch.empty_like(positions)
    for epoch in (positions // num_examples).unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        of_epoch = positions // num_examples == epoch
        indices[of_epoch] = torch.randperm(num_examples, generator=generator)[
            positions[of_epoch] % num_examples
        ]
    return indices


class Callback:
    """Code that runs at fixed points of training; override the methods you need.

    `common.training.run_dir.Recorder` is an example.
    """

    def on_start(self, trainer: "Trainer") -> None:
        """Run before the first step, after a saved state was restored."""

    def on_log(self, trainer: "Trainer", row: Row) -> None:
        """Run after each step; row: step, minutes, loss, grad_norm, learning_rate, images_per_second."""

    def on_checkpoint(self, trainer: "Trainer", row: Row, stopping: bool) -> None:
        """Run every `checkpoint_every` steps, at the end, and when a signal stops the run (`stopping`)."""

    def on_stop(self, trainer: "Trainer") -> None:
        """Run before the process exits because of a signal."""

    def on_end(self, trainer: "Trainer") -> None:
        """Run last, however training ends; also if `on_start` failed."""


class Trainer:
    """The training loop. `fit` trains within the budget of `config` and returns the averaged network.

    validation: a batch for the validation loss. state: a training state to continue from.
    lr_scales: as in `parameter_groups`.
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Loss,
        data: Dataset,
        config: TrainConfig,
        *,
        validation: tuple[Tensor, ...] | None = None,
        lr_scales: Mapping[str, float] | None = None,
        state: dict[str, Any] | None = None,
        callbacks: Sequence[Callback] = (),
        quiet: bool = False,
    ):
        self.loss, self.data, self.config, self.validation = loss, data, config, validation
        self.callbacks, self.quiet = callbacks, quiet
        keep_freed_memory()
        self.device = pick_device(config.device)
        self.network = network.to(self.device)
        self.ema = EMA(self.network, config.ema_decay)
        self.optimizer = OPTIMIZERS[config.optimizer](
            parameter_groups(self.network, lr_scales or {}),
            betas=(0.9, 0.99),
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.step, self.minutes, self.best_validation_loss = 0, 0.0, math.inf
        self.eval_batch_size = 512
        self.last_checkpoint: Path | None = None  # set by a callback; named in errors
        if state:
            self.restore(state)

    def fit(self) -> nn.Module:
        """Train until the budget is used and return the averaged network. Raises UserError for a NaN loss."""
        gpus = [self.device] if self.device.type == "cuda" else []  # not every GPU of the machine
        with ExitStack() as at_end, torch.random.fork_rng(gpus), StopSignals() as signals:
            for callback in self.callbacks:
                at_end.callback(callback.on_end, self)
                callback.on_start(self)
            started = time.monotonic() - 60 * self.minutes
            bar = tqdm(total=100, disable=self.quiet, bar_format="{desc} |{bar:30}| {n:.0f}% {postfix}")
            at_end.enter_context(bar)
            while (progress := self.config.progress(self.step, self.minutes)) < 1:
                before = time.monotonic()
                row = self.train_step(progress)
                row["images_per_second"] = self.global_batch_size / (time.monotonic() - before)
                minutes = (time.monotonic() - started) / 60
                self.minutes, caught = self.sync_across_ranks(minutes, signals.caught or 0)
                row["minutes"] = self.minutes
                done = self.config.progress(self.step, self.minutes) == 1
                checkpoint = done or bool(caught) or self.checkpoint_is_due()
                if checkpoint:
                    row["validation_loss"] = self.validation_loss()
                for callback in self.callbacks:
                    callback.on_log(self, row)
                    if checkpoint:
                        callback.on_checkpoint(self, row, stopping=bool(caught))
                self.report(bar, row)
                if caught:
                    self.exit_after_signal(caught)
        return self.ema.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @property
    def global_batch_size(self) -> int:
        return self.config.batch_size

    def sync_across_ranks(self, minutes: float, caught: int) -> tuple[float, int]:
        """Return the minutes and the signal on which all processes agree; lesson 6 trains in several."""
        return minutes, caught

    def checkpoint_is_due(self) -> bool:
        return self.step % self.config.checkpoint_every == 0

    def train_step(self, progress: float) -> Row:
        """Take one optimizer step and return its row. Raises UserError if loss or gradient is not finite."""
        config, step = self.config, self.step
        self.seed_step()
        indices = batch_indices(step, len(self.data), self.global_batch_size, config.seed)
        self.network.train()
        self.optimizer.zero_grad()
        loss = self.backward(indices)
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        lr = config.learning_rate * learning_rate_factor(step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"]
        self.optimizer.step()
        self.ema.update(self.network, step)
        self.step += 1
        row = {"step": self.step, "loss": loss.item(), "grad_norm": grad_norm.item(), "learning_rate": lr}
        if not (math.isfinite(row["loss"]) and math.isfinite(row["grad_norm"])):
            self.raise_non_finite(row)
        return row

    def seed_step(self) -> None:
        """Derive all randomness of this step from its number."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)

    def backward(self, indices: Int[Tensor, "b"]) -> Tensor:
        """Leave the gradients of a batch in the network's parameters and return its mean loss."""
        batch = [x.to(self.device) for x in self.data.batch(indices)]
        with self.autocast():
            loss = self.loss(self.network, *batch).mean()
        loss.backward()
        return loss.detach()

    def autocast(self) -> AbstractContextManager:
        return autocast(self.device)

    @torch.no_grad()
    def validation_loss(self) -> float:
        """Return the averaged network's loss on the validation batch, with the same randomness every time."""
        if self.validation is None:
            return math.nan
        torch.manual_seed(0)
        parts = zip(*(x.to(self.device).split(self.eval_batch_size) for x in self.validation))
        with self.autocast():
            loss = torch.cat([self.loss(self.ema.network, *part) for part in parts]).mean().item()
        self.best_validation_loss = min(self.best_validation_loss, loss)
        return loss

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs."""
        counters = {"step": self.step, "minutes": self.minutes, "best": self.best_validation_loss}
        return counters | {name: part.state_dict() for name, part in self.stateful().items()}

    def stateful(self) -> dict[str, Any]:
        """Return the objects whose state a checkpoint holds; the loss, too, if it has one."""
        parts = {"network": self.network, "ema": self.ema.network, "optimizer": self.optimizer}
        return parts | ({"loss": self.loss} if hasattr(self.loss, "state_dict") else {})

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a saved state. Raises UserError if it does not fit these settings."""
        try:
            self.step, self.minutes, self.best_validation_loss = (
                state["step"],
                state["minutes"],
                state["best"],
            )
            for name, part in self.stateful().items():
                part.load_state_dict(state[name])
            match_memory_format(self.optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--resume: the saved state does not fit these settings ({reason})") from None

    def report(self, bar: tqdm, row: Row) -> None:
        """Update the progress bar."""
        progress = self.config.progress(self.step, self.minutes)
        left = self.minutes * (1 - progress) / progress
        text = f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s, {left:.1f} min left"
        bar.set_description_str(f"step {self.step}", refresh=False)
        bar.set_postfix_str(text, refresh=False)
        bar.update(100 * progress - bar.n)

    def raise_non_finite(self, row: Row) -> None:
        message = f"step {self.step}: the loss is {row['loss']}, its gradient's norm {row['grad_norm']}"
        if self.last_checkpoint:
            message += f"; the last good checkpoint is {self.last_checkpoint}"
        raise UserError(f"{message}; try a smaller --learning-rate")

    def exit_after_signal(self, number: int) -> None:
        if not self.callbacks:
            raise KeyboardInterrupt
        for callback in self.callbacks:
            callback.on_stop(self)
        sys.exit(128 + number)
