"""Make a finished run the one that its lesson shows: weights, numbers, pictures, and the READMEs' tables.

    python -m common.ship runs/lesson_05_cfg/2026-01-31_12-00-00

writes <lesson>/pretrained (weights in half precision) and <lesson>/results, then fills the READMEs' blocks
marked `<!-- results LESSON -->` (`<!-- results ladder -->`: a row a lesson) from the result files.
`python -m common.ship` alone fills the READMEs again.

    python -m common.ship RUN --name dogs --evaluation evaluation/evaluation.json

ships one of several models of lesson 6: pretrained/dogs.safetensors and results/dogs, with what evaluate.py
measured of it; its mark in a README is `<!-- results lesson_06_miniglide/dogs -->`. An experiment's table is
marked by its file, `<!-- results lesson_06_miniglide/errata.json -->`.
"""

import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

from common.command import UserError, run_command
from common.pictures import loss_curve
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
    write_metrics,
)

STEPS_A_ROW = 20  # of the reference curve
PLACES = ("--cache-dir", "--out", "--checkpoint-dir", "--resume", "--continue-train")
STANDS_FOR = {"--data-dir": "DATA", "--start-from": "RUN", "--vocabulary": "GPT2"}
HEADS = {
    "network": "network",
    "work": "work",
    "batch": "batch",
    "kind": "operations",
    "without": "without",
    "calls": "calls",
    "seconds": "seconds",
    "least_seconds": "at least",
    "of_the_step": "of the step",
    "gflop": "GFLOP",
    "gb": "GB",
    "images_a_second": "images/s",
    "tflops": "TFLOP/s",
    "of_ceiling": "of the machine's best",
    "slower": "slower by",
    "slower_from": "half of the rounds: from",
    "slower_to": "to",
    "peak_mb": "memory, MB",
    "waits_for_data": "waits for data",
    "optimizer": "optimizer",
    "timesteps": "t",
    "training_steps": "steps",
    "minutes_of_training": "minutes of training",
    "variant": "variant",
    "upsampler": "enlarged by",
    "source": "16x16 pixels of",
    "level": "level of noise",
    "way": "holes filled by",
    "guidance": "guidance",
    "scale": "strength",
    "pixels": "pixels",
    "attention_32": "attention at 32x32",
    "attention_16": "at 16x16",
    "attention_8": "at 8x8",
    "gb_without_images": "GB without images",
    "mb_an_image": "MB an image",
    "mb_checkpointed": "with checkpointing",
    "fits_8_gb": "batch in 8 GB",
    "fits_16_gb": "16 GB",
    "fits_24_gb": "24 GB",
    "fits_80_gb": "80 GB",
    "images_seen": "images trained on",
    "guidance_scale": "s",
    "sampler": "sampler",
    "sample_steps": "steps",
    "n": "n",
    "digit_accuracy": "digit right",
    "colour_accuracy": "colour right",
    "held_out_both_accuracy": "both right, held-out pairs",
    "confident": "read with confidence > 0.9",
    "fid": "FID",
    "fid_floor": "FID of real images",
    "fid_of_thumbnails": "FID of thumbnails",
    "psnr": "PSNR, dB",
    "fid_of_details": "FID of details",
    "jump_at_the_edge": "step across the edge",
    "seconds_a_sample": "seconds a sample",
    "kid": "KID",
    "diversity": "diversity (real: 1)",
    "bits_per_dim": "bits/dim",
    "all_right": "all of the caption right",
    "all_right_held_out": "the same, held-out pairs",
    "read_as_dog": "read as a dog",
    "breed_accuracy": "breed right",
    "memorised": "memorised (real: 1 %)",
    "memorised_blurred": "the same, real and blurred",
}
COUNTS = ("n", "guidance_scale", "sample_steps", "level", "scale", "calls")
WHOLE = ("batch", "gflop", "peak_mb", "images_seen", "pixels", "mb_an_image", "mb_checkpointed")
WHOLE += ("training_steps",)
SHARES = ("digit_accuracy", "colour_accuracy", "held_out_both_accuracy", "confident")
SHARES += ("all_right", "all_right_held_out", "read_as_dog", "breed_accuracy", "memorised")
SHARES += ("memorised_blurred", "of_ceiling", "of_the_step", "attention_32", "attention_16", "attention_8")
SHARES += ("slower", "slower_from", "slower_to", "waits_for_data")
FINE = ("jump_at_the_edge", "seconds", "least_seconds")


@dataclass(frozen=True)
class ShipConfig:
    """Put a finished run in its lesson's folder, and fill the tables of the READMEs."""

    run: tyro.conf.Positional[str | None] = None  # the run's folder; without it only the READMEs are filled
    name: str | None = None  # of the weights, in a lesson that ships several; default the lesson's
    evaluation: str | None = None  # evaluation.json, where lesson 6's evaluate.py measured the run alone


def main(config):
    if config.run:
        ship(Path(config.run), config.name, config.evaluation)
    for readme in [ROOT / "README.md", *sorted(ROOT.glob("lesson_*/*.md"))]:
        readme.write_text(filled(readme), encoding="utf-8")


def ship(run, name=None, evaluation=None):
    info, numbers = read_json(run / "config.json"), run / "metrics.json"  # of an experiment there are none
    if info["config"]["dry_run"]:
        raise UserError(f"{run} is a dry run; it has nothing to show")
    metrics = read_json(numbers) if numbers.exists() else {"machine": info["machine"]}
    results, shipped = results_of(info["lesson"], name), shipped_weights(info["lesson"], name)
    for folder in (results, shipped.parent):
        folder.mkdir(exist_ok=True, parents=True)
    weights, facts = load_weights(run, info["lesson"])
    for private in ("data_dir", "cache_dir", "out", "resume", "start_from", "vocabulary"):
        facts["config"].pop(private, None)
    metrics["command"] = public(info["command"])
    if evaluation:
        metrics |= read_json(evaluation)["rows"][0]
        del metrics["checkpoint"]  # a path of this machine
    metrics |= {"minutes": facts["minutes"], "steps": facts["step"]}
    metrics["parameters"] = sum(w.numel() for w in weights.values())
    facts |= {"command": metrics["command"], "metrics": metrics}
    write_atomically(shipped, lambda path: save_weights(path, weights, facts, half=True))
    write_json(results / "metrics.json", metrics)
    write_atomically(results / "metrics.csv", lambda path: thin_out(run / "metrics.csv", path))
    loss_curve(run / "metrics.csv").savefig(results / "loss.png")
    for file in [*run.glob("s*.png"), *run.glob("table_*.png")]:
        shutil.copy(file, results)


def public(command):
    """A command without the folders of the machine it was given on; DATA stands for that of the images."""
    words = [part for word in shlex.split(command) for part in word.split("=", word.startswith("--"))]
    for flag in PLACES:
        if flag in words:
            del words[words.index(flag) : words.index(flag) + 2]
    for flag in STANDS_FOR.keys() & set(words):
        words[words.index(flag) + 1] = STANDS_FOR[flag]
    return shlex.join(words)


def results_of(lesson, name=None):
    return ROOT / lesson / "results" / (name or "")


def thin_out(metrics_csv, path):
    """The same curve in a smaller file: a row is the mean of several steps, named by its last."""
    rows, means = read_metrics(metrics_csv), []
    for group in (rows[i : i + STEPS_A_ROW] for i in range(0, len(rows), STEPS_A_ROW)):
        names = [name for name in COLUMNS if any(name in row for row in group)]
        mean = {name: fmean(row[name] for row in group if name in row) for name in names}
        means.append(mean | {"step": group[-1]["step"]})
    write_metrics(path, means)


def filled(readme):
    """The README's text with each block between two `<!-- results ... -->` marks made anew."""

    def block(found):
        lesson, _, name = found[1].partition("/")
        if lesson == "ladder":
            text = ladder()
        elif found[1].endswith(".json"):
            text = "\n".join(as_markdown(read_json(results_of(lesson, name))["rows"]))
        else:
            text = table(results_of(lesson, name), readme.parent)
        return f"<!-- results {found[1]} -->\n{text}\n<!-- end -->"

    text = readme.read_text(encoding="utf-8")
    return re.sub(r"(?s)<!-- results ([\w/.]+) -->.*?<!-- end -->", block, text)


def table(results, start):
    """The picture and table of a folder of results, as Markdown seen from the folder `start`."""
    if not (results / "metrics.json").exists():
        return "No run is shipped yet."
    metrics = read_json(results / "metrics.json")
    lines = as_markdown(metrics.get("sweep", [metrics]))
    pictures = [results / name for name in ("sweep.png", "table_1.png", "samples.png")]
    path = next(filter(Path.exists, pictures)).relative_to(start)
    machine = metrics["machine"]
    threads = machine["cpu_threads"]
    hardware = machine.get("gpu", f"{threads} CPU thread{'s' * (threads > 1)}")
    note = f"`{metrics['command']}`: {metrics['minutes']:.1f} minutes of training on {hardware}, "
    note += f"{metrics['parameters']:,} parameters."
    return "\n".join([f"![samples]({path.as_posix()})", "", *lines, "", note])


def as_markdown(rows):
    """The lines of a table of rows (dicts), of those columns that have a name in HEADS."""
    columns = [name for name in HEADS if name in rows[0]]
    lines = ["| " + " | ".join(HEADS[name] for name in columns) + " |", "|" + "---|" * len(columns)]
    return lines + ["| " + " | ".join(shown(name, row.get(name)) for name in columns) + " |" for row in rows]


def ladder():
    """What each lesson with digits bought, a row a lesson; of a sweep over guidance scales, s = 3."""
    columns = ("bits_per_dim", "confident", "digit_accuracy", "colour_accuracy", "fid", "fid_floor", "n")
    heads = ["lesson", "parameters", "minutes", "steps", *(HEADS[name] for name in columns)]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for file in sorted(ROOT.glob("lesson_*/results/metrics.json")):
        metrics = read_json(file)
        row = next((row for row in metrics.get("sweep", []) if row["guidance_scale"] == 3), metrics)
        if "confident" not in row:  # other pictures, and other features
            continue
        cells = [shown(name, row.get(name)) for name in columns]
        numbers = [f"{metrics['parameters']:,}", f"{metrics['minutes']:.1f}", f"{metrics['steps']:,}"]
        cells = [file.parent.parent.name, *numbers, *cells]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(name, value):
    if value is None or isinstance(value, str):
        return value or "-"
    if isinstance(value, list):
        return " / ".join(map(str, value))
    forms = {",.0f": WHOLE, ".1%": SHARES, "g": COUNTS, ".3f": FINE}
    return format(value, next((form for form, names in forms.items() if name in names), ",.2f"))


if __name__ == "__main__":
    run_command(main, ShipConfig)
