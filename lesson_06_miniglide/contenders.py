"""What benchmark.py times: our networks and other people's, in training and in sampling."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common.command import UserError, pick_device
from lesson_01_ddpm import train_mnist as lesson_1
from lesson_01_ddpm.diffusion import squared_error
from lesson_01_ddpm.unet import UNet
from lesson_03_adm import train_mnist as lesson_3
from lesson_03_adm.adm_unet import ClassUNet
from lesson_04_text_conditioning import captioned_mnist
from lesson_06_miniglide import train
from lesson_06_miniglide.big_trainer import BigTrainer, autocast_to, compile_network
from lesson_06_miniglide.presets import IMAGE_SIZE, PRESETS, new_diffusion, new_network

SAMPLING_FORMAT = torch.channels_last  # as common.sampling has it
IMAGE_SHAPES = {
    "lesson_01": lesson_1.IMAGE_SHAPE,
    "lesson_03": lesson_1.IMAGE_SHAPE,
    "lesson_05": captioned_mnist.IMAGE_SHAPE,
} | dict.fromkeys(("tiny", "report", "glide"), (3, IMAGE_SIZE, IMAGE_SIZE))


class Contender(NamedTuple):
    """call: (x_t, t, *seen) -> [N, C or more, H, W]. see: (n) -> what n images come with beside x_t and t."""

    network: nn.Module
    image_shape: tuple
    call: Callable
    see: Callable = lambda n: ()


def contender(name, config):
    """The network of that name or adapter file, on the device. Raises UserError."""
    device = pick_device(config.device)
    torch.manual_seed(0)
    if name not in config.against:
        return ours(name, device)
    adapter, image_shape = adapter_of(name), IMAGE_SHAPES[config.networks[0]]
    network = adapter.new_network(image_shape).to(device)
    return Contender(network, image_shape, partial(adapter.call, network))


def ours(name, device):
    shape = IMAGE_SHAPES[name]
    if name == "lesson_01":
        network = UNet(lesson_1.NETWORK).to(device)
        return Contender(network, shape, network)
    if name == "lesson_03":
        network = ClassUNet(lesson_3.NETWORK).to(device)
        return Contender(network, shape, network, lambda n: (torch.arange(n, device=device) % 10,))
    if name == "lesson_05":
        network, _ = captioned_mnist.new_network(captioned_mnist.train_tokenizer())
    else:
        network = new_network(name, *PRESETS[name][:2], new_diffusion(1000).alpha_bar)
    network, context = network.to(device), network.text_config.context

    def see(n):
        tokens = torch.arange(n * context, device=device).view(n, context) % network.text_config.vocab_size
        return (network.encode_text(tokens, torch.ones_like(tokens, dtype=torch.bool)),)

    return Contender(network, shape, network, see)


def adapter_of(path):
    """The module in a file. Raises UserError."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (AttributeError, OSError, ImportError, SyntaxError) as error:
        raise UserError(f"--against {path} cannot be used ({error})") from None
    for needed in ("new_network", "call"):
        if not hasattr(module, needed):
            raise UserError(f"--against {path} has no `{needed}`; benchmark.py's --help says what it needs")
    return module


class OneBatch:
    """What a trainer takes for its data."""

    def __init__(self, *tensors):
        self.tensors = tensors

    def __len__(self):
        return len(self.tensors[0])

    def batch(self, indices):
        return self.tensors


def training_step(contender, config):
    """() -> None: a step of the trainer, with the squared error of eps_hat as its loss."""
    network, n = contender.network, config.batch_size
    x_t, noise = torch.randn(2, n, *contender.image_shape)

    def loss(network, x_t, t, noise):
        return squared_error(contender.call(x_t, t, *contender.see(n)), noise)

    settings = train.Config(
        batch_size=n,
        learning_rate=1e-3,
        optimizer="adamw",
        precision=precision(config),
        activation_checkpointing=config.activation_checkpointing and is_ours(network),
        compile=config.compile,
        device=config.device,
    )
    data = OneBatch(x_t, torch.arange(n), noise)
    return partial(BigTrainer(network, loss, data, settings, None, None, {}, None).train_step, 0.0)


def sampling_step(contender, config):
    """() -> None: one call of the network. Text is read before, once a sample."""
    network = contender.network.eval().requires_grad_(False)
    if is_ours(network):
        network.to(memory_format=SAMPLING_FORMAT)
    if config.compile:
        compile_network(network)
    device = pick_device(config.device)
    x_t = torch.randn(config.batch_size, *contender.image_shape, device=device)
    t = torch.full((len(x_t),), 500, device=device)
    with torch.no_grad(), autocast_to(precision(config), device):
        seen = contender.see(len(x_t))

    def step():
        with torch.no_grad(), autocast_to(precision(config), device):
            contender.call(x_t, t, *seen)

    return recorded(step) if config.cuda_graph else step


def recorded(step):
    """The step's kernels as a CUDA graph, which asks for all of them at once and needs no Python between."""
    for _ in range(3):
        step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def is_ours(network):
    return isinstance(getattr(network, "unet", network), UNet)


WORK = {"training": training_step, "sampling": sampling_step}


def precision(config):
    return "fp32" if config.fp32 else "auto"
