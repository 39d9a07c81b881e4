"""What a resumed run may change, and the command that resumes it."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.cli import flag_name
from common.errors import UserError

OF_ONE_COMMAND = ("resume", "out", "dry_run")  # settings that belong to a command, not to the run
# Settings that choose the images and the noise of each step
OF_EACH_STEP = ("seed", "batch_size", "grad_accum")


def refuse_settings(
    folder: Path, before: Mapping[str, Any], now: Mapping[str, Any], names: Sequence[str]
) -> None:
    """Raise UserError if a setting among `names` is not what it was, or if a newer version wrote others."""
    if unknown := sorted(before.keys() - now.keys()):
        settings = f"whose settings are unknown here: {', '.join(unknown)}"
        raise UserError(f"--resume {folder} was written by a newer version, {settings}; update this code")
    for name in names:
        if (old := before.get(name, now[name])) != now[name]:
            raise UserError(f"--resume {folder}: {flag_name(name)} was {old} and cannot change")


def refuse_other_data(folder: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise UserError if the data are not those that a run was trained on.

    before, now: as config.json holds them. The fingerprints decide; the names do only where there are none.
    """
    prints, names = (before.get("fingerprint"), now["fingerprint"]), (before["data"], now["data"])
    compared = prints if all(prints) else names
    if compared[0] != compared[1]:
        what = "; the images or captions are not the same" if all(prints) else ""
        raise UserError(
            f"--resume {folder} was trained on {names[0]}, the data now is {names[1]}{what}; "
            "name the data that it was trained on"
        )


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return one line about the settings that a resumed run changes, or None if it changes nothing.

    before, now: as config.json holds them, with the settings in "config" and the number of "processes".
    """
    old, new = before["config"], json.loads(json.dumps(now["config"]))  # with lists for tuples
    names = [name for name in new if name in old and old[name] != new[name] and name not in OF_ONE_COMMAND]
    changes = [f"{flag_name(name)} was {old[name]}, now {new[name]}" for name in names]
    processes = before.get("processes", now["processes"]), now["processes"]
    if processes[0] != processes[1]:
        changes.append(f"the run had {processes[0]} process{'es' * (processes[0] > 1)}, now {processes[1]}")
    if not changes:
        return None
    if processes[0] != processes[1] or set(names) & set(OF_EACH_STEP):
        changes.append("so the images of each step are others, and the run is no longer bit for bit the same")
    return f"resume: {'; '.join(changes)}"


def num_processes() -> int:
    """Return the number of processes that train together."""
    return int(os.environ.get("WORLD_SIZE", 1))


def launch_command(*flags: str) -> str:
    """Return the command that runs this script again, with `flags` if there are any; under torchrun, its."""
    launcher, hint = ["python"], ""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        per_node = os.environ["LOCAL_WORLD_SIZE"]
        launcher = ["torchrun", "--standalone", "--nproc-per-node", per_node]
        if (nodes := num_processes() // int(per_node)) > 1:
            launcher = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", per_node]
            hint = "  (on every node, with the rendezvous options of the first command)"
    return shlex.join([*launcher, sys.argv[0], *(flags or sys.argv[1:])]) + hint
