"""The table of what small encoders reach follows from the run folders."""

import importlib.util
import json
from pathlib import Path

from megalodon_lm import EncoderConfig
from megalodon_lm.training.recipe import bundled_recipes

ROOT = Path(__file__).parent.parent


def benchmark():
    spec = importlib.util.spec_from_file_location("modalities", ROOT / "benchmarks" / "modalities.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_finished_runs_are_shown_and_written_between_the_comments_of_a_page(tmp_path, capsys):
    made = benchmark()
    assert {recipe for recipe, _, _ in made.TASKS.values()} <= set(bundled_recipes())
    assert f"{made.BEGIN}\n" in (ROOT / "docs" / "modalities.md").read_text(encoding="utf-8")
    for task in made.TASKS:
        folder = tmp_path / "out" / f"{task}-complex"
        folder.mkdir(parents=True)
        figures = {"accuracy": 0.75, "interval": [0.7, 0.8], "examples": 400, "loss": 1.0}
        (folder / "classification.json").write_text(json.dumps(figures))
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 7, "seconds": 90.0}) + "\n")
        EncoderConfig.named("encoder_small").save(folder / "config.json")
    page = tmp_path / "page.md"
    page.write_text(f"before\n{made.BEGIN}\nold\n{made.END}\nafter\n")
    made.Modalities(tmp_path, tmp_path / "out", averages=["complex"], docs=page).run()  # nothing is left to train
    lines = page.read_text().splitlines()
    assert (lines[0], lines[-1]) == ("before", "after")
    assert "old" not in lines
    assert lines[4] == f"| {made.TASKS['digits'][1]} | 93% | 75.00% (70.0% to 80.0%), 2 |  |"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["runs"]["mnist-complex"]["steps"] == 7
    assert "75.00%" in capsys.readouterr().out
