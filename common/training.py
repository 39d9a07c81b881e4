"""One training loop for every lesson. It knows nothing of diffusion: a network, a loss, batches, a budget.

All that is random in step i comes from (seed, i) alone, the order of the data too. So a run that is killed
and resumed goes on exactly as if nothing had happened, and no generator's state need be saved. (Where the
minutes are the nearer limit the learning rate follows the clock, which never goes twice the same way.)
"""

import copy
import math
import sys
import time
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import nn
from tqdm import tqdm

from common.command import UserError, autocast, pick_device
from common.memory import keep_freed_memory
from common.muon import Muon
from common.pictures import loss_curve
from common.stop_signals import StopSignals

OPTIMIZERS = {"adamw": torch.optim.AdamW, "muon": Muon}


@dataclass(frozen=True)
class TrainConfig:
    steps: int | None = None  # train so many steps; without --steps and --time-limit, the lesson's own budget
    time_limit: float | None = None  # train so many minutes; the learning rate decays with the time used
    batch_size: int = 64  # images a step
    learning_rate: float = 7e-4  # the highest; after a warm-up it decays along a cosine
    optimizer: Literal["adamw", "muon"] = "adamw"  # muon: a step costs a little more, and brings further
    ema_decay: float = 0.995  # of the averaged weights, reached after a warm-up
    seed: int = 0  # of weights, batches, noise and samples
    device: str = "auto"  # auto, cpu, cuda, mps
    checkpoint_every: int = 500  # steps between checkpoints
    resume: str | None = None  # a run's folder or one of its checkpoints, to go on where it stopped
    out: str | None = None  # the run's folder; default runs/<lesson>/<time>
    dry_run: bool = False  # two steps of everything, to see that it works

    fixed: ClassVar[tuple[str, ...]] = ()  # what a resumed run may not change
    default_steps: ClassVar[int] = 4000
    default_minutes: ClassVar[float] = 10.0

    def progress(self, step, minutes):
        """The share of the budget that is used, 0 to 1. Two limits: whichever comes first."""
        steps, limit = self.steps, self.time_limit
        if steps is None and limit is None:
            steps, limit = self.default_steps, self.default_minutes
        if self.dry_run:
            steps, limit = 2, None
        return min(1.0, max(step / steps if steps else 0, minutes / limit if limit else 0))

    def at_most(self, n):
        """n, but 2 in a dry run."""
        return min(n, 2) if self.dry_run else n


@dataclass(frozen=True)
class DigitsConfig(TrainConfig):
    dataset: str = "auto"  # auto (MNIST if it can be had, else drawn digits), mnist or drawn
    data_dir: str | None = None  # the folder above MNIST/raw; default $LESSONS_DATA, else a download to data/


@dataclass(frozen=True)
class MuonConfig(DigitsConfig):
    """Of lessons 3 to 5."""

    batch_size: int = 32  # images a step
    learning_rate: float = 4e-3  # the highest; after a warm-up it decays along a cosine
    optimizer: Literal["adamw", "muon"] = "muon"  # with muon half as many images will do; adamw wants 1.5e-3


def learning_rate_factor(step, progress, warmup=100):
    """Linear warm-up by steps, cosine decay by the share of the budget used."""
    return min(1, (step + 1) / warmup) * (0.5 + 0.5 * math.cos(math.pi * progress))


def batch_indices(step, num_examples, batch_size, seed):
    """Which examples batch `step` holds: every pass over the data has an order of its own."""
    positions = torch.arange(step * batch_size, (step + 1) * batch_size)
    indices = torch.empty_like(positions)
    for epoch in (positions // num_examples).unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        here = positions // num_examples == epoch
        indices[here] = torch.randperm(num_examples, generator=generator)[positions[here] % num_examples]
    return indices


class EMA:
    """An average of the weights over the last ~1 / (1 - decay) steps, fewer while the run is young."""

    def __init__(self, network, decay):
        self.network, self.decay = copy.deepcopy(network).eval().requires_grad_(False), decay

    @torch.no_grad()
    def update(self, network, step):
        """Without the warm-up a short run would average in its random initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.network.parameters()), list(network.parameters()), 1 - decay)
        for average, buffer in zip(self.network.buffers(), network.buffers()):
            average.copy_(buffer)


def parameter_groups(network):
    """The network's parameters; of modules that it names in `slow` with their share of the learning rate."""
    slow, groups = getattr(network, "slow", {}), {1.0: []}
    for name, parameter in network.named_parameters():
        groups.setdefault(slow.get(name.split(".")[0], 1.0), []).append(parameter)
    return [{"params": params, "factor": factor} for factor, params in groups.items() if params]


def in_order_of_weights(optimizer):
    """Put its moments in memory as their weights lie: the run that saved them may have been compiled."""
    for weight, state in optimizer.state.items():
        for name, moment in state.items():
            if moment.shape == weight.shape:
                state[name] = torch.empty_like(weight).copy_(moment)


def train(network, loss, data, config, run=None, validation=None, metadata=None, show=None):
    """Train `network` within the budget of `config` and return its averaged weights as a network.

    loss: (network, *batch) -> [N]. data: has len() and batch(indices) -> tuple of tensors. run: where
    everything is written (None: nowhere). validation: a batch for the validation loss. metadata: the facts
    that weights are saved with. show: averaged network -> figure, for every checkpoint. Raises UserError,
    naming the last good checkpoint, when the loss or its gradient is not finite.
    """
    with torch.random.fork_rng():
        return Trainer(network, loss, data, config, run, validation, metadata or {}, show).train()


class Trainer:
    quiet = False  # no progress bar

    evaluated_at_once = 512  # images of the validation batch

    def __init__(self, network, loss, data, config, run, validation, metadata, show):
        self.loss, self.data, self.config, self.run = loss, data, config, run
        self.validation, self.metadata, self.show = validation, metadata, show
        keep_freed_memory()
        self.device = pick_device(config.device)
        self.network = network.to(self.device)
        self.ema = EMA(self.network, config.ema_decay)
        fused, kind = self.device.type in ("cpu", "cuda"), OPTIMIZERS[config.optimizer]
        self.optimizer = kind(parameter_groups(self.network), betas=(0.9, 0.99), fused=fused)
        self.step, self.minutes, self.best = 0, 0.0, math.inf
        if run:
            if run.state:
                self.restore(run.state)
            run.open_metrics(self.step)

    def train(self):
        started = time.monotonic() - 60 * self.minutes
        bar = tqdm(total=100, disable=self.quiet, bar_format="{desc} |{bar:30}| {n:.0f}% {postfix}")
        with StopSignals() as signals, bar:
            while (progress := self.config.progress(self.step, self.minutes)) < 1:
                before = time.monotonic()
                row = self.train_step(progress)
                row["images_per_second"] = self.images_a_step / (time.monotonic() - before)
                self.minutes, caught = self.agree((time.monotonic() - started) / 60, signals.caught or 0)
                row["minutes"] = self.minutes
                done = self.config.progress(self.step, self.minutes) == 1
                due = done or caught or self.checkpoint_is_due()
                if due:
                    row["validation_loss"] = self.validation_loss()
                if self.run:
                    self.run.log(row)
                self.report(bar, row)
                self.after_step()
                if due and self.run:
                    self.checkpoint(row["validation_loss"], show=not caught)
                if caught:
                    self.stop(caught)
        return self.ema.network.to(memory_format=torch.channels_last)  # in which sampling is a fifth faster

    @property
    def images_a_step(self):
        return self.config.batch_size

    def agree(self, minutes, caught):
        """The minutes and the signal that count: lesson 6 may train in several processes at once."""
        return minutes, caught

    def after_step(self):
        """Lesson 6 draws pictures here."""

    def checkpoint_is_due(self):
        return self.step % self.config.checkpoint_every == 0

    def train_step(self, progress):
        config, step = self.config, self.step
        self.seed_step()
        indices = batch_indices(step, len(self.data), self.images_a_step, config.seed)
        self.network.train()
        self.optimizer.zero_grad()
        loss = self.backward(indices)
        grad_norm = nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        lr = config.learning_rate * learning_rate_factor(step, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["factor"]
        self.optimizer.step()
        self.ema.update(self.network, step)
        self.step += 1
        loss, grad_norm = loss.item(), grad_norm.item()  # only here a GPU is waited for
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.give_up(loss, grad_norm)
        return {"step": self.step, "loss": loss, "grad_norm": grad_norm, "learning_rate": lr}

    def seed_step(self):
        """All that is random in this step follows from its number."""
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)

    def backward(self, indices):
        """Leave the gradients of a batch in the network's parameters; returns its loss."""
        batch = [x.to(self.device) for x in self.data.batch(indices)]
        with self.autocast():
            loss = self.loss(self.network, *batch).mean()
        loss.backward()
        return loss.detach()

    def autocast(self):
        return autocast(self.device)

    @torch.no_grad()
    def validation_loss(self):
        """Loss of the averaged weights; t and noise are drawn from the same seed every time."""
        if self.validation is None:
            return math.nan
        torch.manual_seed(0)
        parts = zip(*(x.to(self.device).split(self.evaluated_at_once) for x in self.validation))
        with self.autocast():
            return torch.cat([self.loss(self.ema.network, *part) for part in parts]).mean().item()

    def checkpoint(self, validation_loss, show):
        best, self.best = validation_loss <= self.best, min(self.best, validation_loss)  # NaN never is
        facts = self.metadata | {"validation_loss": validation_loss, "minutes": self.minutes}
        self.run.save(self.state(), self.ema.network.state_dict(), facts, best)
        figure = loss_curve(self.run.folder / "metrics.csv", self.run.reference)
        figure.savefig(self.run.folder / "loss.png")
        if show and self.show:  # whoever stops a run does not wait for pictures
            self.save_picture()

    def save_picture(self):
        self.show(self.ema.network).savefig(self.run.folder / "samples" / f"step_{self.step:07d}.png")

    def state(self):
        counters = {"step": self.step, "minutes": self.minutes, "best": self.best}
        return counters | {name: part.state_dict() for name, part in self.parts().items()}

    def parts(self):
        """What a checkpoint must hold; the loss too, if it is one that remembers."""
        parts = {"network": self.network, "ema": self.ema.network, "optimizer": self.optimizer}
        return parts | ({"loss": self.loss} if hasattr(self.loss, "state_dict") else {})

    def restore(self, state):
        try:
            self.step, self.minutes, self.best = state["step"], state["minutes"], state["best"]
            for name, part in self.parts().items():
                part.load_state_dict(state[name])
            in_order_of_weights(self.optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"--resume: what was saved does not fit these settings ({reason})") from None

    def report(self, bar, row):
        progress = self.config.progress(self.step, self.minutes)
        left = self.minutes * (1 - progress) / progress
        text = f"loss {row['loss']:.4f}, {row['images_per_second']:.0f} images/s, {left:.1f} min left"
        bar.set_description_str(f"step {self.step}", refresh=False)
        bar.set_postfix_str(text, refresh=False)
        bar.update(100 * progress - bar.n)

    def give_up(self, loss, grad_norm):
        message = f"step {self.step}: the loss is {loss}, its gradient's norm {grad_norm}"
        if self.run and self.run.state_file:
            message += f"; the last good checkpoint is {self.run.state_file}"
        raise UserError(f"{message}; try a smaller --learning-rate")

    def stop(self, number):
        if not self.run:
            raise KeyboardInterrupt
        print(f"\nstopped and saved at step {self.step}; to go on: {self.run.again}")
        sys.exit(128 + number)
