"""A run is a folder: configuration, metrics, pictures, and checkpoints that are either whole or not there."""

import csv
import dataclasses
import json
import os
import platform
import shlex
import struct
import sys
from datetime import datetime
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from common.command import UserError, as_flag, pick_device

ROOT = Path(__file__).parent.parent
CPU_INFO = Path("/proc/cpuinfo")
COLUMNS = ["step", "minutes", "loss", "grad_norm", "learning_rate", "images_per_second", "validation_loss"]


def write_atomically(path, write):
    """Call write(temporary path), then move the file into place: a crash leaves the old one or the new."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.part{path.suffix}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be written ({error})") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path, content, **settings):
    """settings: of json.dumps."""
    text = json.dumps(content, indent=1, **settings) + "\n"
    write_atomically(path, lambda part: part.write_text(text, encoding="utf-8"))


def make_folder(folder, flag):
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{flag} {folder} cannot be made or written ({error.strerror})") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"{flag} {folder} cannot be written; name another place")


class Run:
    """runs/<lesson>/<time>/ with config.json, metrics.csv, loss.png, samples/ and checkpoints/.

    reference: metrics.csv of the run behind the lesson's shipped weights, if it is there.
    """

    def __init__(self, lesson, config, data, keep=2, again=None):
        """Make the folder, or find the one to resume.

        data: the data set's name, which may not change. keep: so many of the newest checkpoints; None: all.
        again: what goes on with the run once it is stopped; default this command with --resume.
        """
        self.keep = keep
        self.info = {"lesson": lesson, "data": data, "config": dataclasses.asdict(config)}
        if config.resume:
            self.state_file = find_state(config.resume)
            self.state = load_state(self.state_file)
            self.folder = self.state_file.parent.parent
            old = read_json(self.folder / "config.json")
            self.info["command"] = old["command"]
            if old["lesson"] != lesson:
                raise UserError(
                    f"--resume {self.folder} is a run of {old['lesson']}; take that lesson's script"
                )
            if old["data"] != data:
                raise UserError(f"--resume {self.folder}: trained on {old['data']}, now finds {data}")
            for name in config.fixed:
                if (before := old["config"].get(name)) != self.info["config"][name]:
                    flag = as_flag(name)
                    raise UserError(f"--resume {self.folder}: {flag} was {before} and cannot change")
            if config.out and Path(config.out) != self.folder:
                raise UserError(
                    f"--resume {self.folder} goes on in that folder; leave out --out {config.out}"
                )
        else:
            self.state_file = self.state = None
            self.folder = Path(config.out or f"runs/{lesson}/{datetime.now():%Y-%m-%d_%H-%M-%S}")
            self.info["command"] = " ".join(["python", *map(shlex.quote, sys.argv)])
            if any(self.folder.glob("checkpoints/step_*.pt")):
                raise UserError(f"--out {self.folder} holds a run already; use --resume, or name another")
            if any(self.folder.glob("*")) and not (self.folder / "config.json").exists():
                raise UserError(f"--out {self.folder} is not empty; name another")
        self.reference = ROOT / lesson / "results" / "metrics.csv"
        self.info["machine"] = describe_machine(config.device)
        self.again = again or shlex.join(["python", sys.argv[0], "--resume", str(self.folder)])
        for folder in (self.folder, self.folder / "samples", self.folder / "checkpoints"):
            make_folder(folder, "--out")
        if not config.resume:
            self.write_json("config.json", self.info)
        self.writer = tensorboard_writer(self.folder)
        print(f"run: {self.folder}")

    def write_json(self, name, content):
        write_json(self.folder / name, content, allow_nan=False)

    def finish(self, numbers, picture, figure):
        """Write metrics.json and the run's last picture, and say where they are."""
        command, machine = self.info["command"], self.info["machine"]
        self.write_json("metrics.json", {"command": command, **numbers, "machine": machine})
        figure.savefig(self.folder / picture)
        print(f"look at {self.folder / picture}; numbers in metrics.json beside it\nrun: {self.folder}")

    # -- metrics ---------------------------------------------------------------------------------------------

    def open_metrics(self, step):
        """Start metrics.csv, or go on behind row `step`: from here on the run is this one's."""
        self.write_json("config.json", self.info)
        path = self.folder / "metrics.csv"
        rows = [row for row in read_metrics(path) if row["step"] <= step] if step else []
        write_atomically(path, lambda part: write_metrics(part, rows))
        self.metrics = open(path, "a", newline="", buffering=1)  # noqa: SIM115 (open as long as the run)
        self.rows = csv.DictWriter(self.metrics, COLUMNS)

    def log(self, row):
        self.rows.writerow(rounded(row))
        if self.writer:
            for name, value in row.items():
                self.writer.add_scalar(name, value, row["step"])

    # -- checkpoints -----------------------------------------------------------------------------------------

    def save(self, state, weights, metadata, best):
        """Write a step's training state and EMA weights; keep the newest of them, and the best weights.

        Later steps than this one are of a way that was given up, if the run was resumed before them.
        """
        folder, name = self.folder / "checkpoints", f"step_{state['step']:07d}"
        facts = self.info | metadata | {"step": state["step"]}
        for file in [f"{name}.safetensors"] + ["best.safetensors"] * best:
            write_atomically(folder / file, lambda path: save_weights(path, weights, facts))
        self.state_file = folder / f"{name}.pt"
        write_atomically(self.state_file, lambda path: torch.save(state, path))
        files = sorted(folder.glob("step_*.pt"))
        earlier = [file for file in files if file <= self.state_file]
        for old in set(files) - set(earlier[-self.keep :] if self.keep else earlier):
            old.unlink()
            old.with_suffix(".safetensors").unlink(missing_ok=True)


def save_weights(path, weights, facts, half=False):
    """Weights as safetensors; `facts` (lesson, network settings ...) become its metadata, as JSON."""
    dtype = torch.float16 if half else torch.float32
    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in weights.items()}
    save_file(tensors, path, {k: json.dumps(v) for k, v in facts.items()})


def load_weights(checkpoint, lesson, flag="--checkpoint"):
    """Weights in float32 and their facts, from a file or from the newest checkpoint of a run's folder.

    lesson: whose they must be; None: of any lesson, which facts["lesson"] names. flag: which named them.
    Raises UserError if there is nothing to load, if the file is broken, or if it belongs to another lesson.
    """
    path = newest(Path(checkpoint), "safetensors", flag)
    if not path.exists():
        raise UserError(f"{flag} {path} is not there; name a .safetensors file or the folder of a run")
    try:
        with safe_open(path, "pt") as file:
            facts = {k: json.loads(v) for k, v in (file.metadata() or {}).items()}
            weights = {k: file.get_tensor(k).float() for k in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError, ValueError, struct.error) as error:
        raise UserError(f"{flag} {path} is not a whole .safetensors file ({error})") from None
    if "lesson" not in facts or lesson not in (None, facts["lesson"]):
        origin = facts.get("lesson", "no lesson of this series")
        hint = f"; try python {origin}/sample.py" if "lesson" in facts else ""
        raise UserError(f"{flag} {path} comes from {origin}, not from {lesson or 'one'}{hint}")
    return weights, facts


def digest(network):
    """A short name of a network's weights, the same wherever they lie."""
    found = sha256()
    for weight in network.state_dict().values():
        found.update(weight.float().cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def shipped_weights(lesson, name=None):
    """name: of those of a lesson that ships several; default its own."""
    return ROOT / lesson / "pretrained" / f"{name or lesson}.safetensors"


def newest(path, ending, flag):
    """`path` itself, or if it is a run's folder its newest checkpoint."""
    if not path.is_dir():
        return path
    if not (files := sorted((path / "checkpoints").glob(f"step_*.{ending}"))):
        raise UserError(f"{flag} {path} is a folder without checkpoints/step_*.{ending}; begin a new run")
    return files[-1]


def find_state(resume):
    """The training state that `--resume` means: a .pt file, or the newest of a run's folder."""
    path = newest(Path(resume), "pt", "--resume")
    path = path.with_suffix(".pt") if path.suffix == ".safetensors" else path  # weights name their state
    if not path.is_file():
        raise UserError(f"--resume {path} is not there; name a run's folder or a .pt file in its checkpoints")
    return path


def load_state(path):
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for broken files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--resume {path} is not a whole training state ({reason})") from None


def saved_config(resume, config_type):
    """The configuration of the run that is resumed, as a `config_type`; what it had not is the default."""
    saved = read_json(find_state(resume).parent.parent / "config.json")["config"]
    known = {field.name for field in dataclasses.fields(config_type)}
    return as_config(
        config_type, {k: v for k, v in saved.items() if k in known} | {"out": None, "dry_run": False}
    )


def as_config(config_type, values):
    """A configuration dataclass from what JSON made of it."""
    return config_type(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def read_json(path):
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error})") from None


def rounded(row):
    """A row as metrics.csv holds it."""
    return {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}


def write_metrics(path, rows):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(map(rounded, rows))


def read_metrics(path):
    """Rows of a metrics.csv as numbers; an empty cell is left out."""
    with open(path, newline="") as file:
        rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
    return [row | {"step": int(row["step"])} for row in rows if "step" in row]


def tensorboard_writer(folder):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(folder)


def cpu_name():
    """Its model where Linux says it, else its architecture."""
    lines = CPU_INFO.read_text().splitlines() if CPU_INFO.exists() else []
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def describe_machine(device="auto"):
    """Hardware and versions, for the record. device: as --device says it."""
    machine = {"python": platform.python_version(), "torch": torch.__version__}
    threads = torch.get_num_threads() * int(os.environ.get("WORLD_SIZE", 1))  # of all processes of torchrun
    machine |= {"processor": cpu_name(), "cpu_threads": threads}
    return machine | ({"gpu": torch.cuda.get_device_name()} if pick_device(device).type == "cuda" else {})
