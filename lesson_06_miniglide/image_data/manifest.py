"""A cache's manifest: how many images there are, and the names of all that were skipped or converted."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from common.errors import UserError
from lesson_06_miniglide.image_data.records import BENIGN_PROBLEMS

MAX_BROKEN = 0.05  # fraction of the records that may be broken


def names_by_note(pairs: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """Group (name, note) pairs: note -> names."""
    names: dict[str, list[str]] = {}
    for name, note in pairs:
        names.setdefault(note, []).append(name)
    return names


def format_manifest(manifest: dict[str, Any]) -> str:
    """Return the counts of a manifest on one line."""
    parts = [f"data: {manifest['images']} images from {manifest['records']} records"]
    for kind in ("skipped", "converted"):
        parts += [f"{kind}: {len(names)} {note}" for note, names in manifest[kind].items()]
    return "; ".join(parts)


def check_broken(manifest: dict[str, Any], folder: Path, flag: str, allow_broken: bool = False) -> None:
    """Raise UserError if there is no image, or if more than MAX_BROKEN of the records are broken.

    Dead links and images without a caption are not counted as broken. folder: of the cache. flag: of the
    data set, with its value.
    """
    skipped = manifest["skipped"]
    broken = {note: names for note, names in skipped.items() if note not in BENIGN_PROBLEMS}
    present = manifest["records"] - sum(len(skipped.get(note, [])) for note in BENIGN_PROBLEMS)
    fraction = sum(map(len, broken.values())) / max(1, present)
    full_list = f"{folder / 'manifest.json'} lists them all"
    examples = [f" (the first: {names[0]}, {note})" for note, names in (broken or skipped).items()] or [""]
    if not manifest["images"]:
        reason = f"none of its {manifest['records']} records can be used{examples[0]}"
        raise UserError(f"{flag}: {reason}; {full_list}")
    if fraction > MAX_BROKEN and not allow_broken:
        raise UserError(
            f"{flag}: {fraction:.1%} of its records are broken{examples[0]}; {full_list}; "
            "--allow-broken uses the rest"
        )
