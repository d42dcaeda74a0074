"""Files of results, and tables of them beside published scores."""

import json
from dataclasses import replace

import pytest

from megalodon_lm.architectures import build, config_of
from megalodon_lm.data.tokenizer import ByteTokenizer
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.results import Results, Score, TaskResult, identify
from megalodon_lm.evaluation.results_table import published, table


def results(name="mine", **scores):
    tasks = [
        TaskResult(task, "1.0", shots, 100, {metric: Score(value, 0.01)}, metric)
        for task, (metric, value, shots) in scores.items()
    ]
    return Results(name, {"fingerprint": "f"}, {"seed": 0}, tasks)


def test_a_file_gives_back_what_was_written(tmp_path):
    made = results(mmlu=("acc", 0.25, 5))
    made.save(tmp_path / "a.json")
    assert Results.load(tmp_path / "a.json") == made
    assert "torch" in made.packages
    assert "megalodon-lm" in made.packages
    made.save(tmp_path / "a.json")  # its own kind is replaced
    (tmp_path / "b.txt").write_text("a text")
    with pytest.raises(InputError, match="is not a file of results"):
        made.save(tmp_path / "b.txt")


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"megalodon_results": 1}', '{"megalodon_results": 1, "tasks": 3}']
)
def test_other_files_are_refused(tmp_path, content):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(InputError, match="is no file of results"):
        Results.load(tmp_path / "a.json")
    with pytest.raises(InputError, match="cannot read"):
        Results.load(tmp_path / "none.json")
    (tmp_path / "a.json").write_text(json.dumps({"megalodon_results": 2}))
    with pytest.raises(InputError, match="later version"):
        Results.load(tmp_path / "a.json")


def test_results_stand_beside_the_published_ones():
    mine = results(winogrande=("acc", 0.5012, 0), mmlu=("acc", 0.2513, 5), own=("f1", 0.3, 0))
    other = results("other", winogrande=("acc", 0.7, 3))
    lambada = TaskResult("lambada_openai", "1.0", 0, 10, {"perplexity": Score(12.3456, 0.5, share=False)}, "perplexity")
    other.tasks.append(lambada)
    found = table([mine, other])
    assert found.columns == ["model", "MMLU", "WinoGrande", "own f1", "lambada_openai perplexity"]
    rows = {row[0]: row[1:] for row in found.rows}
    assert rows["Megalodon-7B, published"] == ["49.8", "71.4", "", ""]
    assert rows["RWKV-7B, published"] == ["", "68.4", "", ""]
    assert "MPT, published" not in rows  # it shares no task
    assert rows["mine"] == ["25.1 ± 1.0", "50.1 ± 1.0", "30.0 ± 1.0", ""]
    assert rows["other"] == ["", "70.0 ± 1.0 (3-shot)", "", "12.346 ± 0.500"]


@pytest.mark.parametrize(
    "wrong", [{"headline": "f1"}, {"scores": {"acc": ["much", None]}}, {"scores": {}}, {"shots": []}]
)
def test_damaged_results_are_refused(tmp_path, wrong):
    results(mmlu=("acc", 0.25, 5)).save(tmp_path / "a.json")
    values = json.loads((tmp_path / "a.json").read_text())
    values["tasks"][0] |= wrong
    (tmp_path / "a.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="is no file of results"):
        Results.load(tmp_path / "a.json")


def test_what_should_not_be_compared_says_so():
    mine, other = results(mmlu=("acc", 0.25, 5), own=("f1", 0.5, 1)), results("other", own=("f1", 0.5, 0))
    later = TaskResult("mmlu", "2.0", 5, 1200, {"acc": Score(0.3)}, "acc")
    other.tasks.append(later)
    rows = {row[0]: row[1:] for row in table([mine, other]).rows}
    assert rows["mine"] == ["25.0 ± 1.0 (version 1.0, 100 questions)", "50.0 ± 1.0 (1-shot)"]
    assert rows["other"] == ["30.0 (version 2.0, 1,200 questions)", "50.0 ± 1.0"]


def test_files_of_one_model_are_one_row():
    """Unless both have the task; and another model of the same name is told from it."""
    mine, more = results(mmlu=("acc", 0.25, 5)), results(own=("f1", 0.5, 0))
    assert [row for row in table([mine, more]).rows if row[0] == "mine"] == [["mine", "25.0 ± 1.0", "50.0 ± 1.0"]]
    assert [row[0] for row in table([mine, mine]).rows][-2:] == ["mine", "mine"]
    twin = replace(more, model={"fingerprint": "0123456789abcdef"})
    assert [row[0] for row in table([mine, twin]).rows][-2:] == ["mine f", "mine 01234567"]


def test_every_published_score_has_a_column():
    known = published()
    columns = {column["task"] for column in known["columns"]}
    for row in known["rows"]:
        assert row.keys() - {"model"} <= columns
        assert all(0 < value < 100 for key, value in row.items() if key != "model")
    assert len(columns) == 13
    assert "2404.08801" in known["source"]


def test_a_model_is_known_by_its_weights():
    model = build(config_of({"architecture": "llama", "parameters": 100_000, "vocab_size": 259}))
    found = identify(model, ByteTokenizer())
    assert found["architecture"] == "llama"
    assert found["fingerprint"] == model.fingerprint()
    assert found["tokenizer"] == "bytes-259"
