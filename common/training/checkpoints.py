"""Saving and loading: weights with the metadata that their network is built from, and training states."""

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from common.device import pick_device
from common.errors import UserError
from common.files import ROOT
from common.protocols import Metadata, Model


def save_weights(path: Path, weights: Mapping[str, Tensor], metadata: Metadata, half: bool = False) -> None:
    """Write a safetensors file; the values of `metadata` are stored as JSON."""
    dtype = torch.float16 if half else torch.float32
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in weights.items()}
    save_file(tensors, path, {k: json.dumps(v) for k, v in metadata.items()})


def load_weights(
    checkpoint: str | Path, lesson: str | None, flag: str = "--checkpoint"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return weights in float32 and their metadata, from a file or the latest checkpoint of a run's folder.

    lesson: the lesson that the weights must come from; None accepts any lesson. flag: named in errors. Raises
    UserError if there is nothing to load, if the file is broken or holds values that are not finite, or if it
    belongs to another lesson.
    """
    path = latest_checkpoint(Path(checkpoint), "safetensors", flag)
    if not path.exists():
        raise UserError(f"{flag} {path} does not exist; name a .safetensors file or the folder of a run")
    try:
        with safe_open(path, "pt") as file:
            metadata = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{flag} {path} is not a complete .safetensors file ({error})") from None
    if "lesson" not in metadata or lesson not in (None, metadata["lesson"]):
        origin = metadata.get("lesson", "no lesson of this series")
        hint = f"; try python {origin}/sample.py" if "lesson" in metadata else ""
        raise UserError(f"{flag} {path} comes from {origin}, not from {lesson or 'one'}{hint}")
    refuse_non_finite(weights, f"{flag} {path}")
    return weights, metadata


def load_model(
    checkpoint: str | Path | None,
    lesson: str | None,
    build_from_metadata: Callable[[Metadata], Model],
    device: str = "cpu",
    flag: str = "--checkpoint",
) -> Model:
    """Return a trained model, frozen and in evaluation mode; checkpoint None means the pretrained weights.

    lesson: as in `load_weights`. build_from_metadata: builds the model with untrained weights. Raises
    UserError.
    """
    if checkpoint is None:
        assert lesson is not None, "without a checkpoint the lesson decides which weights are loaded"
        checkpoint = pretrained_path(lesson)
    weights, metadata = load_weights(checkpoint, lesson, flag)
    try:
        model = build_from_metadata(metadata)
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # whatever the settings may hold
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{flag} {checkpoint} has settings that this version cannot read ({reason})"
        ) from None
    except UserError as error:
        if str(error).startswith(flag):
            raise
        raise UserError(f"{flag} {checkpoint}: {error}") from None
    load_state(model.network, weights, flag)
    # channels last: sampling is 5 to 13 % faster
    network = model.network.to(pick_device(device), memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Model(network.eval().requires_grad_(False), model.process, metadata)


def refuse_non_finite(tree: Any, name: str) -> None:
    """Raise UserError if a tensor in a nesting of dicts and lists is not finite. name: what the tree is."""
    if path := non_finite(tree):
        raise UserError(f"{name} holds numbers that are not finite (in {path}); use another checkpoint")


def non_finite(tree: Any) -> str | None:
    """Return the name of a tensor that is not finite, or None if all are. tree: as in `named_tensors`."""
    return next((path for path, tensor in named_tensors(tree) if not tensor.isfinite().all()), None)


def named_tensors(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors in a nesting of dicts, lists and tuples, each with its keys, joined by dots."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping | list | tuple):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from named_tensors(value, f"{path}.{key}" if path else str(key))


def load_state(network: nn.Module, weights: Mapping[str, Tensor], flag: str) -> None:
    """Load weights into a network. Raises UserError, naming the flag, if they do not fit."""
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise UserError(f"{flag}: these weights do not fit the network's settings ({reason})") from None


def weights_hash(network: nn.Module) -> str:
    """Return a short name of a network's weights that does not depend on where they are stored."""
    found = sha256()
    for weight in network.state_dict().values():
        found.update(weight.float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def pretrained_path(lesson: str, name: str | None = None) -> Path:
    """Return the path of a lesson's pretrained weights; `name` selects one of several."""
    return ROOT / lesson / "pretrained" / f"{name or lesson}.safetensors"


def results_dir(lesson: str, name: str | None = None) -> Path:
    """Return the folder of a lesson's result files; `name` selects one of several models."""
    return ROOT / lesson / "results" / (name or "")


def latest_checkpoint(path: Path, suffix: str, flag: str) -> Path:
    """Return `path`, or if it is a run's folder, its latest checkpoint. Raises UserError if it has none."""
    if not path.is_dir():
        return path
    if not (files := sorted((path / "checkpoints").glob(f"step_*.{suffix}"))):
        raise UserError(f"{flag} {path} is a folder without checkpoints/step_*.{suffix}; start a new run")
    return files[-1]


def find_training_state(resume: str | Path) -> Path:
    """Return the .pt file that --resume names: itself, or the latest of a run's folder. Raises UserError."""
    path = latest_checkpoint(Path(resume), "pt", "--resume")
    path = (
        path.with_suffix(".pt") if path.suffix == ".safetensors" else path
    )  # weights lie next to their state
    if not path.is_file():
        raise UserError(
            f"--resume {path} does not exist; name a run's folder or a .pt file in its checkpoints"
        )
    return path


def save_training_state(path: Path, state: dict[str, Any]) -> None:
    """Write a training state. Raises OSError if the disk is full, for which torch has several errors."""
    try:
        torch.save(state, path)
    except RuntimeError as error:
        raise OSError(str(error).splitlines()[0]) from None


def load_training_state(path: str | Path) -> dict[str, Any]:
    """Return the content of a training state on the CPU.

    Raises UserError if the file is broken, or if a number in it is not finite.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--resume {path} is not a complete training state ({reason})") from None
    if not isinstance(state, dict):
        raise UserError(f"--resume {path} is not a training state")
    refuse_non_finite(state, f"--resume {path}")
    return state
