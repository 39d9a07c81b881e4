"""What a run becomes when it is shipped: weights, numbers, and a table in a README."""

import pytest
import torch

from common import runs, ship
from common.runs import load_weights, read_json, write_json
from tests.test_training import run_line

MEASURED = {"n": 10, "guidance_scale": 3.0, "breed_accuracy": 0.5}


@pytest.fixture
def house(tmp_path, monkeypatch):
    for module in (runs, ship):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    return tmp_path


def test_one_of_several_models_is_shipped_with_what_was_measured_of_it(house):
    run, network = run_line(house, steps=4)
    run.finish({"steps": 4}, "samples.png", ship.loss_curve(run.folder / "metrics.csv"))
    write_json(house / "evaluation.json", {"rows": [{"checkpoint": "runs/mine", **MEASURED}]})
    lesson, readme = run.info["lesson"], house / "README.md"
    readme.write_text(f"above\n<!-- results {lesson}/dogs --><!-- end -->\nbelow")
    ship.main(ship.ShipConfig(str(run.folder), "dogs", str(house / "evaluation.json")))

    weights, facts = load_weights(house / lesson / "pretrained" / "dogs.safetensors", lesson)
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-3, atol=1e-6)
    results = house / lesson / "results" / "dogs"
    metrics = read_json(results / "metrics.json")
    assert metrics.items() >= MEASURED.items() and metrics["steps"] == 4 and "checkpoint" not in metrics
    assert facts["metrics"]["n"] == 10 and facts["metrics"]["command"] == facts["command"]
    assert not {"out", "resume"} & facts["config"].keys()
    assert {file.name for file in results.iterdir()} >= {"loss.png", "samples.png", "metrics.csv"}

    text = readme.read_text()
    assert "| 3 | 10 | 50.0% |" in text and text.startswith("above") and text.endswith("below")
    assert f"({lesson}/results/dogs/samples.png)" in text
    readme.write_text("<!-- results lesson_06_miniglide/cats --><!-- end -->")
    assert "No run is shipped yet." in ship.filled(readme)


def test_a_command_is_shown_without_the_folders_of_its_machine():
    given = "python train.py --data-dir '/home/me/my dogs' --dogs --out runs/x --resume /tmp/y --time-limit 9"
    assert ship.public(given) == "python train.py --data-dir DATA --dogs --time-limit 9"
    assert ship.public("python train.py --batch-size 9") == "python train.py --batch-size 9"
    given = "python train.py --data-dir=/home/me/x --out=runs/y --start-from /home/me/base --dry-run"
    assert ship.public(given) == "python train.py --data-dir DATA --start-from RUN --dry-run"


def test_a_run_of_an_experiment_is_shipped_without_numbers_of_its_own(house):
    run, network = run_line(house, steps=4)
    lesson = run.info["lesson"]
    (house / "README.md").write_text("")
    ship.main(ship.ShipConfig(str(run.folder), "line"))
    weights, _ = load_weights(house / lesson / "pretrained" / "line.safetensors", lesson)
    assert weights.keys() == network.state_dict().keys()
    metrics = read_json(house / lesson / "results" / "line" / "metrics.json")
    assert metrics["steps"] == 4 and metrics["machine"] == run.info["machine"]


def test_the_table_of_an_experiment_is_filled_in_where_it_is_marked(house):
    rows = [{"variant": "right", "n": 5, "fid_of_thumbnails": 1.234, "all_right": 0.2, "minutes": 9}]
    results = ship.results_of("lesson_06_miniglide")
    results.mkdir(parents=True)
    write_json(results / "errata.json", {"rows": rows})
    (house / "README.md").write_text("")
    errata = results.parent / "ERRATA.md"
    errata.write_text("<!-- results lesson_06_miniglide/errata.json -->old<!-- end -->")
    ship.main(ship.ShipConfig())
    lines = errata.read_text().splitlines()
    assert lines[1:-1] == [
        "| variant | n | FID of thumbnails | all of the caption right |",
        "|---|---|---|---|",
        "| right | 5 | 1.23 | 20.0% |",
    ]
