"""What the benchmarks run: training steps and sampling steps of our networks and of other implementations."""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import tyro
from jaxtyping import Bool, Int
from torch import Tensor, nn

from common.cli import PositiveInt, check_choice
from common.device import describe_machine, pick_device
from common.errors import UserError
from common.files import make_folder, write_json
from common.results.table import format_table
from lesson_01_ddpm import model as lesson_1
from lesson_01_ddpm.diffusion import squared_error
from lesson_03_adm import model as lesson_3
from lesson_04_text_conditioning import model as lesson_4
from lesson_04_text_conditioning.captioned_mnist import train_tokenizer
from lesson_06_miniglide import train
from lesson_06_miniglide.model import build_model, unwrap
from lesson_06_miniglide.networks.presets import PRESETS
from lesson_06_miniglide.training.distributed import DDPTrainer, autocast_to, compile_network

Step = Callable[[], object]
IMAGE_SHAPES: dict[str, tuple[int, int, int]] = {
    "lesson_01": lesson_1.IMAGE_SHAPE,
    "lesson_03": lesson_3.IMAGE_SHAPE,
    "lesson_05": lesson_4.IMAGE_SHAPE,
} | {name: (3, *2 * (PRESETS[name].network.image_size,)) for name in ("tiny", "report", "glide")}


class StepSettings(NamedTuple):
    """How a step is computed."""

    batch_size: int = 8
    precision: str = "auto"  # as train.py's flag
    activation_checkpointing: bool = False  # of our networks, in training
    compile: bool = False
    cuda_graph: bool = False  # in sampling
    device: str = "auto"


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings that the benchmarks share."""

    # lesson_01, lesson_03, lesson_05 (the networks for digits), tiny, report or glide (presets of lesson 6)
    networks: tyro.conf.Positional[tuple[str, ...]] = ("lesson_03", "lesson_05", "tiny")
    batch_size: tuple[PositiveInt, ...] = (8,)  # each of them is measured
    rounds: PositiveInt = 7  # steps that are timed, after two that are not
    fp32: bool = False  # do not use bf16, even where it is fast
    activation_checkpointing: bool = False  # of our own networks, as in train.py
    device: str = "auto"  # auto, cpu, cuda or mps
    out: str | None = None  # a .json file for the numbers

    def step_settings(self, batch_size: int, **more: Any) -> StepSettings:
        """Return the settings of a step with this batch size."""
        return StepSettings(
            batch_size, self.precision, self.activation_checkpointing, device=self.device, **more
        )

    @property
    def precision(self) -> str:
        """The precision as train.py's flag."""
        return "fp32" if self.fp32 else "auto"

    def check(self) -> None:
        """Raise UserError if a network does not exist, or if --out could not be written."""
        for name in self.networks:
            check_choice("network", name, IMAGE_SHAPES)
        if self.out:
            make_folder(Path(self.out).parent, "--out")


def finish(config: Any, rows: Sequence[Mapping[str, Any]], **content: Any) -> None:
    """Print a table with the columns of the first row; write rows and `content` to config.out, if given."""
    print(format_table(rows))
    if config.out:
        settings = {k: v for k, v in asdict(config).items() if k not in ("against", "out")}
        machine = describe_machine(getattr(config, "device", "cpu"))
        write_json(config.out, {"machine": machine, "settings": settings, **content, "rows": rows})


class Case(NamedTuple):
    """A network to measure."""

    network: nn.Module
    image_shape: tuple[int, int, int]
    call: Callable[..., Tensor]  # (x_t, t, *inputs) -> output, whose first C channels are eps_hat
    make_inputs: Callable[[int], tuple] = lambda n: ()  # n -> the conditioning of n images
    memory_format: torch.memory_format = (
        torch.channels_last
    )  # in sampling, as our pretrained networks have it


def make_case(name: str, device: torch.device) -> Case:
    """Return one of our networks, with random weights, on the device. name: one of IMAGE_SHAPES."""
    torch.manual_seed(0)
    if name == "lesson_01":
        network = lesson_1.build_model().network
    elif name == "lesson_03":
        network = lesson_3.build_model().network
    elif name == "lesson_05":
        network = lesson_4.build_model(train_tokenizer()).network
    else:
        network = build_model(name).network
    case = Case(network.to(device), IMAGE_SHAPES[name], network)
    if name == "lesson_01":
        return case
    if name == "lesson_03":
        return case._replace(make_inputs=lambda n: (torch.arange(n, device=device) % 10,))
    return case._replace(make_inputs=lambda n: (network.encode_text(*full_captions(network, n, device)),))  # type: ignore[operator]


def full_captions(
    network: nn.Module, n: int, device: str | torch.device = "cpu"
) -> tuple[Int[Tensor, "{n} length"], Bool[Tensor, "{n} length"]]:
    """Return tokens and mask of n captions that fill the context of a text-conditional network."""
    text = unwrap(network).text_config
    tokens = torch.arange(n * text.context_length, device=device).view(n, -1) % text.vocab_size
    return tokens, torch.ones_like(tokens, dtype=torch.bool)


def make_adapter_case(path: str, image_shape: tuple[int, int, int], device: torch.device) -> Case:
    """Return the network of an adapter file for images of this shape. Raises UserError."""
    torch.manual_seed(0)
    adapter = load_adapter(path)
    network = adapter.build_network(image_shape).to(device)
    return Case(network, image_shape, partial(adapter.call, network), memory_format=torch.preserve_format)


def load_adapter(path: str) -> ModuleType:
    """Import the adapter in a file; speed.py says what it must define. Raises UserError."""
    spec = importlib.util.spec_from_file_location("adapter", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--against {path} cannot be used (it must be a .py file)")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (OSError, ImportError, SyntaxError) as error:
        raise UserError(f"--against {path} cannot be used ({error})") from None
    for needed in ("build_network", "call"):
        if not hasattr(module, needed):
            raise UserError(f"--against {path} has no `{needed}`; speed.py's --help says what it needs")
    return module


class OneBatch:
    """A data set of one batch, which is already in memory."""

    name = "one batch"

    def __init__(self, *tensors: Tensor):
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, indices: Tensor) -> tuple[Tensor, ...]:
        return self.tensors


def training_step(case: Case, settings: StepSettings) -> Step:
    """Return a function that takes one step of lesson 6's trainer, with AdamW and L_simple's squared error.

    Captions are encoded in every step.
    """
    n = settings.batch_size
    x_t, noise = torch.randn(2, n, *case.image_shape)

    def loss(network: nn.Module, x_t: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return squared_error(case.call(x_t, t, *case.make_inputs(n)), noise)

    config = train.Config(
        batch_size=n,
        learning_rate=1e-3,
        optimizer="adamw",
        precision=settings.precision,
        activation_checkpointing=settings.activation_checkpointing,
        compile=settings.compile,
        device=settings.device,
    )
    trainer = DDPTrainer(case.network, loss, OneBatch(x_t, torch.arange(n) % 1000, noise), config)
    return partial(trainer.train_step, 0.0)


def sampling_step(case: Case, settings: StepSettings) -> Step:
    """Return a function that evaluates the network once. Captions are encoded beforehand, once per sample."""
    network = case.network.eval().requires_grad_(False).to(memory_format=case.memory_format)  # type: ignore[call-overload]
    if settings.compile:
        compile_network(network)
    device = pick_device(settings.device)
    x_t = torch.randn(settings.batch_size, *case.image_shape, device=device)
    t = torch.full((len(x_t),), 500, device=device)
    with torch.no_grad(), autocast_to(settings.precision, device):
        inputs = case.make_inputs(len(x_t))

    def step() -> None:
        with torch.no_grad(), autocast_to(settings.precision, device):
            case.call(x_t, t, *inputs)

    return capture_graph(step) if settings.cuda_graph else step


def capture_graph(step: Step) -> Step:
    """Record the step's kernels as a CUDA graph and return a function that replays them without Python."""
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


STEPS: dict[str, Callable[[Case, StepSettings], Step]] = {
    "training": training_step,
    "sampling": sampling_step,
}
