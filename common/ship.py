"""Make a finished run the one that its lesson shows: weights, numbers, pictures, and the READMEs' tables.

    python -m common.ship runs/lesson_05_cfg/2026-01-31_12-00-00

writes <lesson>/pretrained (weights in half precision) and <lesson>/results, then fills the READMEs' blocks
marked `<!-- results LESSON -->` (`<!-- results ladder -->`: a row a lesson) from the result files.
`python -m common.ship` alone fills the READMEs again.

"""

import csv
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

from common.command import run_command
from common.runs import (
    COLUMNS,
    ROOT,
    load_weights,
    read_json,
    read_metrics,
    save_weights,
    shipped_weights,
    write_atomically,
    write_json,
)

STEPS_A_ROW = 20  # of the reference curve
HEADS = {
    "guidance_scale": "s",
    "n": "n",
    "digit_accuracy": "digit right",
    "colour_accuracy": "colour right",
    "held_out_both_accuracy": "both right, held-out pairs",
    "confident": "read with confidence > 0.9",
    "fid": "FID",
    "fid_floor": "FID of real digits",
    "kid": "KID",
    "diversity": "diversity (real: 1)",
    "bits_per_dim": "bits/dim",
}
COUNTS = ("n", "guidance_scale")
SHARES = ("digit_accuracy", "colour_accuracy", "held_out_both_accuracy", "confident")


@dataclass(frozen=True)
class ShipConfig:
    """Put a finished run in its lesson's folder, and fill the tables of the READMEs."""

    run: tyro.conf.Positional[str | None] = None  # the run's folder; without it only the READMEs are filled


def main(config):
    if config.run:
        ship(Path(config.run))
    for readme in [ROOT / "README.md", *sorted(ROOT.glob("lesson_*/README.md"))]:
        readme.write_text(filled(readme), encoding="utf-8")


def ship(run):
    info, metrics = read_json(run / "config.json"), read_json(run / "metrics.json")
    lesson = ROOT / info["lesson"]
    results = lesson / "results"
    for folder in (results, lesson / "pretrained"):
        folder.mkdir(exist_ok=True)
    weights, facts = load_weights(run, info["lesson"])
    for private in ("data_dir", "out"):
        facts["config"].pop(private, None)
    command = re.sub(r" --(data-dir|out) \S+", "", info["command"])
    facts, metrics = facts | {"command": command, "metrics": metrics}, metrics | {"command": command}
    metrics |= {"minutes": facts["minutes"], "steps": facts["step"]}
    metrics["parameters"] = sum(w.numel() for w in weights.values())
    shipped = shipped_weights(info["lesson"])
    write_atomically(shipped, lambda path: save_weights(path, weights, facts, half=True))
    write_json(results / "metrics.json", metrics)
    write_atomically(results / "metrics.csv", lambda path: thin_out(run / "metrics.csv", path))
    for file in [run / "loss.png", *run.glob("s*.png")]:
        shutil.copy(file, results)


def thin_out(metrics_csv, path):
    """The same curve in a smaller file: a row is the mean of several steps, named by its last."""
    rows = read_metrics(metrics_csv)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for group in (rows[i : i + STEPS_A_ROW] for i in range(0, len(rows), STEPS_A_ROW)):
            names = [name for name in COLUMNS if any(name in row for row in group)]
            mean = {name: fmean(row[name] for row in group if name in row) for name in names}
            mean["step"] = group[-1]["step"]
            writer.writerow({k: f"{v:.6g}" for k, v in mean.items()})


def filled(readme):
    """The README's text with each block between two `<!-- results ... -->` marks made anew."""

    def block(found):
        name = found[1]
        text = ladder() if name == "ladder" else table(name, readme.parent)
        return f"<!-- results {name} -->\n{text}\n<!-- end -->"

    text = readme.read_text(encoding="utf-8")
    return re.sub(r"(?s)<!-- results (\w+) -->.*?<!-- end -->", block, text)


def table(lesson, start):
    """The lesson's picture and table, as Markdown seen from the folder `start`."""
    if not (ROOT / lesson / "results").exists():
        return "No run is shipped yet."
    metrics = read_json(ROOT / lesson / "results" / "metrics.json")
    rows = metrics.get("sweep", [metrics])
    columns = [name for name in HEADS if name in rows[0]]
    lines = ["| " + " | ".join(HEADS[name] for name in columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(shown(name, row[name]) for name in columns) + " |" for row in rows]
    picture = "sweep.png" if "sweep" in metrics else "samples.png"
    path = (ROOT / lesson / "results" / picture).relative_to(start)
    machine = metrics["machine"]
    threads = machine["cpu_threads"]
    hardware = machine.get("gpu", f"{threads} CPU thread{'s' * (threads > 1)}")
    note = f"`{metrics['command']}`: {metrics['minutes']:.1f} minutes of training on {hardware}, "
    note += f"{metrics['parameters']:,} parameters."
    return "\n".join([f"![samples]({path.as_posix()})", "", *lines, "", note])


def ladder():
    """What each lesson bought, a row a lesson; of a sweep over guidance scales, s = 3."""
    columns = ("bits_per_dim", "confident", "digit_accuracy", "colour_accuracy", "fid", "fid_floor", "n")
    heads = ["lesson", "parameters", "minutes", "steps", *(HEADS[name] for name in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for file in sorted(ROOT.glob("lesson_*/results/metrics.json")):
        metrics = read_json(file)
        row = next((row for row in metrics.get("sweep", []) if row["guidance_scale"] == 3), metrics)
        cells = [shown(name, row.get(name)) for name in columns]
        numbers = [f"{metrics['parameters']:,}", f"{metrics['minutes']:.1f}", f"{metrics['steps']:,}"]
        cells = [file.parent.parent.name, *numbers, *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(name, value):
    if value is None:
        return "-"
    return f"{value:g}" if name in COUNTS else f"{value:.1%}" if name in SHARES else f"{value:.2f}"


if __name__ == "__main__":
    run_command(main, ShipConfig)
