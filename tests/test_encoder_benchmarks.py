"""The benchmarks of encoders: tables of accuracy follow from the run folders, and rivals are as large."""

import json
from pathlib import Path

from megalodon_lm import EncoderConfig
from megalodon_lm.training.recipe import bundled_recipes

from .benchmarks import benchmark

ROOT = Path(__file__).parent.parent


def test_finished_runs_are_shown_and_written_between_the_comments_of_a_page(tmp_path, capsys):
    made = benchmark("modalities")
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
    assert lines[4] == f"| {made.TASKS['digits'][1]} | 93% | 75.00% (70.0% to 80.0%) |  |"
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["runs"]["mnist-complex"]["steps"] == 7
    assert "75.00%" in capsys.readouterr().out


def test_encoders_are_timed_beside_a_transformer_of_their_size(tmp_path, capsys):
    out = tmp_path / "encoders.json"
    benchmark("encoders").Encoders("encoder_small", [64], 16, rounds=1, json=out).run()
    found = json.loads(out.read_text())
    ours, theirs = found["parameters"]
    assert abs(theirs / ours - 1) < 0.01
    assert [(row["work"], row["type"]) for row in found["rows"]] == [
        ("training", "float32"), ("training", "bf16"), ("reading", "float32"), ("reading", "bf16")
    ]  # fmt: skip
    assert all(row["ours"] > 0 and row["theirs"] > 0 for row in found["rows"])
    assert "Transformer" in capsys.readouterr().out
