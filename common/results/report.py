"""Tables in Markdown files, generated from result files.

A block in a README.md or RESULTS.md names what it shows, and `python -m common.results.publish` fills it:

    <!-- results lesson_05_cfg -->                  figure, metrics and command of the lesson's published run
    <!-- results lesson_06_miniglide/dogs -->       the same for one of several models
    <!-- results lesson_05_cfg/interval.json -->    the table of an experiment
    <!-- results lesson_06_miniglide/benchmarks/against_cpu.json -->   one of benchmarks/results/
    <!-- results summary -->                        one row per lesson on digits

`columns` after the name selects columns, and `where` selects rows by a query of pandas' DataFrame.eval:

    <!-- results lesson_05_cfg columns guidance_scale, fid where guidance_scale in [0, 1, 3] -->

Without `columns` a table shows what has a title in COLUMN_TITLES, below or in a module of its lesson. A title
is a text, or a pair of a text and the format of the numbers, such as ".1%".
"""

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pandas as pd

from common.errors import UserError
from common.files import ROOT, read_json

Title: TypeAlias = "str | tuple[str, str]"  # text, or (text, format)

# Columns that several lessons have. Lessons add to them, or give other titles, next to their experiments.
COLUMN_TITLES: dict[str, Title] = {
    "lesson": "lesson",
    "parameter_count": "parameters",
    "variant": "variant",
    "mistake": "bug",
    "optimizer": "optimizer",
    "training_steps": "training steps",
    "minutes_of_training": ("minutes of training", ".1f"),
    "guidance_scale": "s",
    "digit_accuracy": "digit correct",
    "colour_accuracy": "color correct",
    "held_out_both_accuracy": "both correct, held-out pairs",
    "confident": ("classified with p > 0.9", ".1%"),
    "bits_per_dim": ("bits/dim", ".2f"),
    "fid": ("FID", ".2f"),
    "fid_floor": ("FID of real images", ".2f"),
    "kid": ("KID", ".2f"),
    "kid_error": ("error of KID", ".2f"),
    "diversity": ("diversity (real: 1)", ".2f"),
    "n": "n",
}
BLOCK = re.compile(
    r"(?s)<!-- results (?P<name>[\w/.]+)(?: columns (?P<columns>[^\n]+?))?(?: where (?P<where>[^\n]+?))? -->"
    r".*?<!-- end -->"
)
FIGURES = ("sweep.png", "table_1.png", "samples.png")  # of a run; the first that exists is shown
IN_CAPTION = ("command", "minutes", "steps", "parameters", "machine")  # metrics of a run, not in its table
SUMMARY_METRICS = ("bits_per_dim", "confident", "digit_accuracy", "colour_accuracy", "fid", "fid_floor", "n")
SUMMARY_SCALE = 3  # guidance scale of the row that represents a sweep
NOT_PUBLISHED = "No run has been published yet."
NOT_MEASURED = "Not measured yet."


def documents() -> list[Path]:
    """Return the Markdown files that may contain tables."""
    return [ROOT / "README.md", *sorted(ROOT.glob("lesson_*/**/*.md"))]


def render_readme(document: Path) -> str:
    """Return the text of a Markdown file with all its tables generated again.

    Raises UserError if a block selects columns or rows that its result file does not have.
    """

    def block(found: re.Match[str]) -> str:
        opening = found[0].partition("-->")[0] + "-->"
        try:
            content = render_block(found["name"], document.parent, found["columns"], found["where"])
        except (KeyError, pd.errors.UndefinedVariableError) as error:
            raise UserError(f"{document}, {opening}: {error} is not in the result file") from None
        return f"{opening}\n{content}\n<!-- end -->"

    return BLOCK.sub(block, document.read_text(encoding="utf-8"))


def render_block(name: str, start: Path, columns: str | None = None, where: str | None = None) -> str:
    """Return the content of one block. start: the folder of the document, for links."""
    names = re.split(r", *", columns) if columns else None
    if name == "summary":
        return lesson_summary(names)
    path, titles = find_results(name), column_titles(name.partition("/")[0])
    if name.endswith(".json"):
        if not path.exists():
            return NOT_MEASURED
        return markdown_table(read_json(path)["rows"], titles, names, where)
    if not (path / "metrics.json").exists():
        return NOT_PUBLISHED
    metrics = read_json(path / "metrics.json")
    rows = metrics.get("sweep", [{k: v for k, v in metrics.items() if k not in IN_CAPTION}])
    parts = [describe_training(metrics)]
    if any(name in rows[0] for name in titles):  # the training run of an experiment has no metrics
        parts.insert(0, markdown_table(rows, titles, names, where))
    if figures := [path / figure for figure in FIGURES if (path / figure).exists()]:
        parts.insert(0, f"![samples]({figures[0].relative_to(start).as_posix()})")
    return "\n\n".join(parts)


def find_results(name: str) -> Path:
    """Return the path of results: the name with a folder `results` inserted after one of its folders."""
    parts = name.split("/")
    paths = [ROOT.joinpath(*parts[:i], "results", *parts[i:]) for i in range(1, len(parts) + 1)]
    return next(filter(Path.exists, paths), paths[0])


def describe_training(metrics: Mapping[str, Any]) -> str:
    """Return a sentence with the command, duration, hardware and size of a published run."""
    machine, threads = metrics["machine"], metrics["machine"]["cpu_threads"]
    hardware = machine.get("gpu", f"{threads} CPU thread{'s' * (threads > 1)}")
    minutes = f"{metrics['minutes']:.1f} minutes of training on {hardware}, " if "minutes" in metrics else ""
    return f"`{metrics['command']}`: {minutes}{metrics['parameters']:,} parameters."


def markdown_table(
    rows: Sequence[Mapping[str, Any]],
    titles: Mapping[str, Title],
    columns: Sequence[str] | None = None,
    where: str | None = None,
) -> str:
    """Return rows as a Markdown table.

    columns: default all that have a title, in the order of `titles`; one without a title shows its name.
    where: a query that selects rows. Raises KeyError for an unknown column.
    """
    table = pd.DataFrame(list(rows), dtype=object)
    if where:
        table = table[table.infer_objects().eval(where)]
    if columns is None:
        columns = [name for name in titles if name in table]
    headings, cells = [], []
    for name in columns:
        title = titles.get(name, name.replace("_", " "))
        text, spec = (title, default_format(name)) if isinstance(title, str) else title
        headings.append(text)
        cells.append([format_cell(value, spec) for value in table[name]])
    lines = [headings, ["---"] * len(columns), *zip(*cells)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def default_format(name: str) -> str:
    """Return the format of a column whose title names none: percent for accuracies, rates and fractions."""
    shared = COLUMN_TITLES.get(name)
    if isinstance(shared, tuple):
        return shared[1]
    return ".1%" if name.endswith(("accuracy", "_rate", "_fraction")) else ""


def column_titles(lesson: str) -> dict[str, Title]:
    """Return column -> title of a lesson's modules, and of the columns that all lessons share.

    The modules are parsed and not imported, because `common` knows no lesson.
    """
    titles: dict[str, Title] = {}
    for module in sorted(ROOT.glob(f"{lesson}/**/*.py")):
        source = module.read_text(encoding="utf-8")
        for node in ast.parse(source).body if "\nCOLUMN_TITLES" in source else ():
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "COLUMN_TITLES":
                titles = ast.literal_eval(node.value) | titles
    return titles | {name: title for name, title in COLUMN_TITLES.items() if name not in titles}


def format_cell(value: Any, spec: str = "") -> str:
    """Return a cell's text; by default integers have commas, other numbers three significant digits."""
    if isinstance(value, list):
        return " / ".join(format_cell(part, spec) for part in value)
    if value is None or value == "" or value != value:  # NaN differs from itself
        return "-"
    if isinstance(value, str):
        return value
    return format(value, spec or (",.0f" if isinstance(value, int) or abs(value) >= 100 else ".3g"))


def lesson_summary(columns: Sequence[str] | None = None) -> str:
    """Return a table of what each lesson on digits achieved, one row per lesson; of a sweep, s = 3.

    A run in results/default counts instead of the published one: that of the lesson's own command, if the
    pretrained weights had a longer training. columns: default all of them.
    """
    rows: list[dict[str, Any]] = []
    for file in sorted(ROOT.glob("lesson_*/results/metrics.json")):
        default = file.parent / "default/metrics.json"
        metrics = read_json(default if default.exists() else file)
        sweep = metrics.get("sweep", [metrics])
        row = next((row for row in sweep if row.get("guidance_scale") == SUMMARY_SCALE), metrics)
        if "confident" not in row:  # other lessons draw other images and are measured in other features
            continue
        rows.append({"lesson": file.parent.parent.name, "parameter_count": metrics["parameters"]})
        rows[-1] |= {"training_steps": metrics["steps"], "minutes_of_training": metrics.get("minutes")}
        rows[-1] |= {name: row.get(name) for name in SUMMARY_METRICS}
    return markdown_table(rows, COLUMN_TITLES, columns or list(rows[0])) if rows else NOT_PUBLISHED
