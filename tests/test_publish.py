"""What a run becomes when it is published: weights, results, and tables in Markdown files."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from common.files import read_json, write_json
from common.plotting import plot_losses
from common.results import publish, report
from common.training import checkpoints
from common.training.checkpoints import load_weights
from common.training.config import TrainConfig
from common.training.metrics_csv import read_metrics
from common.training.run_dir import RunDir
from common.training.train import train

LESSON = "lesson_test"
MEASURED = {"n": 10, "guidance_scale": 3.0, "breed_accuracy": 0.5}


@pytest.fixture
def house(tmp_path, monkeypatch):
    """An empty repository whose README.md has no tables yet."""
    for module in (checkpoints, report):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    (tmp_path / "README.md").write_text("")
    (tmp_path / LESSON).mkdir()
    titles = '{"variant": "variant", "breed_accuracy": "breed correct", "fid_8x8": ("FID at 8x8", ".2f")}'
    (tmp_path / LESSON / "experiments.py").write_text(
        f'import torch\n\nCOLUMN_TITLES = {titles}\nraise OSError("run")'
    )
    return tmp_path


class Line:
    """Points on a line."""

    name = "line"

    def __len__(self):
        return 64

    def batch(self, indices):
        x = indices[:, None] / 64
        return x, 3 * x


def train_line(folder, **settings):
    """Train a line in four steps; return (run, network)."""
    config = TrainConfig(
        **{"out": str(folder / "run"), "device": "cpu", "batch_size": 8, "steps": 4, **settings}
    )
    run = RunDir(LESSON, config, "line")
    torch.manual_seed(0)

    def loss(network, x, y):
        return (network(x) - y).square().mean(1)

    return run, train(
        nn.Linear(1, 16), loss, Line(), config, run=run, validation=Line().batch(torch.arange(8))
    )


def test_one_of_several_models_is_published_with_what_was_measured_of_it(house):
    run, network = train_line(house)
    run.finish({"steps": 4}, "samples.png", plot_losses(read_metrics(run.folder / "metrics.csv")))
    write_json(house / "evaluation.json", {"rows": [{"checkpoint": "runs/mine", **MEASURED}]})
    readme = house / "README.md"
    readme.write_text(f"above\n<!-- results {LESSON}/dogs --><!-- end -->\nbelow")
    publish.main(publish.PublishConfig(str(run.folder), "dogs", str(house / "evaluation.json")))

    weights, metadata = load_weights(house / LESSON / "pretrained" / "dogs.safetensors", LESSON)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-6)
    results = house / LESSON / "results" / "dogs"
    metrics = read_json(results / "metrics.json")
    assert metrics.items() >= MEASURED.items() and metrics["steps"] == 4 and "checkpoint" not in metrics
    assert metadata["metrics"]["n"] == 10 and metadata["metrics"]["command"] == metadata["command"]
    assert not {"out", "resume"} & metadata["config"].keys()
    assert {file.name for file in results.iterdir()} >= {"loss.png", "samples.png", "metrics.csv"}
    assert [row["step"] for row in read_metrics(results / "metrics.csv")] == [4]

    text = readme.read_text()
    assert "| 50.0% | 3 | 10 |" in text and text.startswith("above") and text.endswith("below")
    assert f"({LESSON}/results/dogs/samples.png)" in text and "minutes of training on" in text
    readme.write_text("<!-- results lesson_06_miniglide/cats --><!-- end -->")
    assert "No run has been published yet." in report.render_readme(readme)


def test_a_command_is_shown_without_the_folders_of_its_machine():
    given = "python train.py --data-dir '/home/me/my dogs' --dogs --out runs/x --resume /tmp/y --time-limit 9"
    assert publish.sanitize_command(given) == "python train.py --data-dir DATA --dogs --time-limit 9"
    assert publish.sanitize_command("python train.py --batch-size 9") == "python train.py --batch-size 9"
    for flag in ("--init-from", "--start-from"):
        given = f"python train.py --data-dir=/home/me/x --out=runs/y {flag} /home/me/base --dry-run"
        assert publish.sanitize_command(given) == f"python train.py --data-dir DATA {flag} RUN --dry-run"


def test_a_run_of_an_experiment_is_published_without_metrics_of_its_own(house):
    run, network = train_line(house)
    publish.main(publish.PublishConfig(str(run.folder), "line"))
    weights, _ = load_weights(house / LESSON / "pretrained" / "line.safetensors", LESSON)
    assert weights.keys() == network.state_dict().keys()
    metrics = read_json(house / LESSON / "results" / "line" / "metrics.json")
    assert metrics["steps"] == 4 and metrics["machine"] == run.info["machine"]
    (house / "README.md").write_text(f"<!-- results {LESSON}/line --><!-- end -->")
    lines = report.render_readme(house / "README.md").splitlines()
    assert len(lines) == 3 and lines[1].endswith(", 32 parameters.")


def test_a_dry_run_is_not_published(house):
    run, _ = train_line(house, dry_run=True)
    with pytest.raises(UserError, match="is a dry run; there is nothing to publish"):
        publish.main(publish.PublishConfig(str(run.folder)))
    assert not (house / LESSON / "pretrained").exists()


ROWS = [
    {"variant": "right", "n": 5, "fid_8x8": 1.234, "digit_accuracy": 0.2, "minutes": 9},
    {"variant": "wrong", "n": 1234, "fid_8x8": 5, "digit_accuracy": None, "minutes": 8, "fits": [12, 3400]},
]


def filled(house, name, rows=ROWS, document=f"{LESSON}/RESULTS.md", folder=f"{LESSON}/results"):
    """Return the lines between the two marks of a block after publishing."""
    (house / folder).mkdir(parents=True, exist_ok=True)
    write_json(house / folder / "table.json", {"rows": rows})
    (house / document).write_text(f"<!-- results {name} -->old<!-- end -->")
    publish.main(publish.PublishConfig())
    lines = (house / document).read_text().splitlines()
    assert lines[0] == f"<!-- results {name} -->" and lines[-1] == "<!-- end -->"
    return lines[1:-1]


def test_the_table_of_an_experiment_has_the_columns_with_a_title(house):
    assert filled(house, f"{LESSON}/table.json") == [
        "| variant | FID at 8x8 | digit correct | n |",
        "| --- | --- | --- | --- |",
        "| right | 1.23 | 20.0% | 5 |",
        "| wrong | 5.00 | - | 1,234 |",
    ]


def test_a_block_selects_columns_and_rows(house):
    assert filled(house, f"{LESSON}/table.json columns fits, minutes, variant where n > 5") == [
        "| fits | minutes | variant |",
        "| --- | --- | --- |",
        "| 12 / 3,400 | 8 | wrong |",
    ]
    assert filled(house, f'{LESSON}/table.json columns n where variant == "right"')[2:] == ["| 5 |"]
    for unknown in ("columns fidd", "where fidd > 1"):
        with pytest.raises(UserError, match=f"table.json {unknown} -->: .*fidd.* is not in the result file"):
            filled(house, f"{LESSON}/table.json {unknown}")


def test_a_subfolder_with_results_of_its_own_is_found(house):
    name, folder = f"{LESSON}/benchmarks/table.json", f"{LESSON}/benchmarks"
    (house / folder).mkdir()
    lines = filled(house, name, document=f"{folder}/README.md", folder=f"{folder}/results")
    assert lines[2] == "| right | 1.23 | 20.0% | 5 |"
    assert filled(house, f"{LESSON}/benchmarks/none.json") == ["Not measured yet."]


def test_the_summary_has_one_row_per_lesson_on_digits(house):
    lessons = {
        "lesson_1": {"confident": 0.5, "fid": 4.0, "n": 10},
        "lesson_2": {"sweep": [{"guidance_scale": s, "confident": s / 10, "n": 10} for s in (1, 3)]},
        "lesson_3": {"fid": 1.0, "n": 10},
    }
    for lesson, metrics in lessons.items():
        (house / lesson / "results").mkdir(parents=True)
        write_json(
            house / lesson / "results" / "metrics.json",
            metrics | {"parameters": 1000, "minutes": 2.55, "steps": 4000},
        )
    lines = filled(house, "summary columns lesson, parameter_count, training_steps, confident, fid")
    assert lines[2:] == [
        "| lesson_1 | 1,000 | 4,000 | 50.0% | 4.00 |",
        "| lesson_2 | 1,000 | 4,000 | 30.0% | - |",
    ]


@pytest.mark.parametrize(
    ("value", "spec", "text"),
    [
        (None, "", "-"),
        (float("nan"), "", "-"),
        ("", "", "-"),
        ("a", ".1%", "a"),
        (3.0, "", "3"),
        (0.0123456, "", "0.0123"),
        (1025.74, "", "1,026"),
        (0.125, ".0%", "12%"),
        ([1, 2000], "", "1 / 2,000"),
    ],
)
def test_cells(value, spec, text):
    assert report.format_cell(value, spec) == text
