"""Tasks of the harness over local data: every layout gives the harness's own prompts, and the network is left alone."""

import csv
import json
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.task_data import FOUNDRY, LocalCopies
from megalodon_lm.evaluation.task_definitions import TABLE, Definitions, usual_shots

OFFICIAL = Path(__file__).parent.parent.parent / "shared" / "data"
SIQA = {"answerA": "rest", "answerB": "run", "answerC": "sing", "label": "1"}
ROWS = {  # as the hub has them: dataset, part, split, row
    "mmlu_anatomy": ("cais/mmlu", "anatomy", "test", {"question": "Bones?", "choices": list("wxyz"), "answer": 2}),
    "boolq": ("aps/super_glue", "boolq", "validation", {"passage": "It is.", "question": "is it", "label": 1}),
    "hellaswag": (
        "Rowan/hellaswag", "", "validation",
        {"activity_label": "Sailing", "ctx_a": "A boat sails.", "ctx_b": "the crew", "label": "1",
         "endings": ["sinks.", "sings.", "rows [title] away.", "sleeps."]},
    ),
    "piqa": ("baber/piqa", "", "validation", {"goal": "Open a jar", "sol1": "Turn.", "sol2": "Wait.", "label": 0}),
    "social_iqa": ("lighteval/siqa", "", "validation", {"context": "Ann ran.", "question": "What next?", **SIQA}),
    "winogrande": (
        "allenai/winogrande", "winogrande_xl", "validation",
        {"sentence": "The cup broke the plate because the _ was hard.", "option1": "cup", "option2": "plate",
         "answer": "1"},
    ),
    "arc_easy": (
        "allenai/ai2_arc", "ARC-Easy", "test",
        {"question": "What melts?", "choices": {"text": ["ice", "iron", "air"], "label": ["A", "B", "C"]},
         "answerKey": "A"},
    ),
    "arc_challenge": (
        "allenai/ai2_arc", "ARC-Challenge", "test",
        {"question": "What rusts?", "choices": {"text": ["ice", "iron"], "label": ["A", "B"]}, "answerKey": "B"},
    ),
    "nq_open": ("google-research-datasets/nq_open", "", "validation", {"question": "who sang", "answer": ["Ann"]}),
    "triviaqa": (
        "mandarjoshi/trivia_qa", "rc.nocontext", "validation",
        {"question": "Who sang?", "answer": {"aliases": ["Ann", "Anna"], "value": "Ann"}},
    ),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test", {"text": "The crew took the boat out to sea"}),
}  # fmt: skip
FOUNDRY_ROWS = {
    "boolq": {"query": "Passage: It is.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
    "piqa": {"query": "Question: Open a jar\n", "choices": ["Turn.", "Wait."], "gold": 0},
    "arc_easy": {"query": "Question: What melts?", "choices": ["ice", "iron", "air"], "gold": 0},
    "arc_challenge": {"query": "Question: What rusts?", "choices": ["ice", "iron"], "gold": 1},
    "winogrande": {
        "context_options": [
            "The cup broke the plate because the cup", "The cup broke the plate because the plate"
        ],
        "continuation": "was hard.", "gold": 0,
    },
    "hellaswag": {**ROWS["hellaswag"][3], "label": 1},
}  # fmt: skip


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def asked(name, folder):
    """What the harness asks the model, with the index of the right answer."""
    definitions = Definitions([name], folder)
    (task,) = definitions.load(name)["tasks"].values()
    task.set_config("num_fewshot", 0)
    task.build_all_requests()
    return [request.args for request in task.instances], task.doc_to_target(task.eval_docs[0])


def in_hub_layout(folder, name, ending=".parquet"):
    dataset, part, split, row = ROWS[name]
    place = folder / dataset.rpartition("/")[2] / part if part != "default" else folder / dataset / "data"
    write(place / f"{split}-00000-of-00001{ending}", [row])


@pytest.mark.parametrize("name", ROWS)
def test_the_hubs_layout_and_single_files_give_the_same_prompts(name, tmp_path):
    in_hub_layout(tmp_path / "hub", name)
    requests, target = asked(name, tmp_path / "hub")
    in_hub_layout(tmp_path / "lines", name, ".jsonl")
    assert asked(name, tmp_path / "lines") == (requests, target)
    write(tmp_path / "one" / f"{name}.json", [ROWS[name][3]])
    if not name.startswith("mmlu"):
        assert asked(name, tmp_path / "one") == (requests, target)
    if name in FOUNDRY_ROWS:
        write(tmp_path / "foundry" / "inside" / f"{name}_1000.jsonl", [FOUNDRY_ROWS[name]])
        assert asked(name, tmp_path / "foundry") == (requests, target)


def test_prompts_are_those_that_the_harness_defines(tmp_path):
    for name in ("winogrande", "mmlu_anatomy", "lambada_openai", "boolq"):
        in_hub_layout(tmp_path, name)
    requests, _ = asked("winogrande", tmp_path)
    assert requests == [(f"The cup broke the plate because the {option}", " was hard.") for option in ("cup", "plate")]
    requests, target = asked("mmlu_anatomy", tmp_path)
    subject = "The following are multiple choice questions (with answers) about anatomy.\n\n"
    assert requests == [(f"{subject}Bones?\nA. w\nB. x\nC. y\nD. z\nAnswer:", f" {letter}") for letter in "ABCD"]
    assert target == 2
    assert asked("lambada_openai", tmp_path)[0] == [("The crew took the boat out to", " sea")]
    assert asked("boolq", tmp_path)[0][1] == ("It is.\nQuestion: is it?\nAnswer:", " yes")


@pytest.mark.parametrize("header", [True, False])
def test_the_files_of_mmlus_authors(header, tmp_path):
    in_hub_layout(tmp_path / "hub", "mmlu_anatomy")
    for split, answer in (("test", 2 if header else "C"), ("dev", 0 if header else "A")):
        (tmp_path / "data" / split).mkdir(parents=True)
        with (tmp_path / "data" / split / f"anatomy_{split}.csv").open("w", newline="") as file:
            lines = csv.writer(file)
            if header:
                lines.writerow(["question", "choice0", "choice1", "choice2", "choice3", "answer"])
            lines.writerow(["Bones?", *"wxyz", answer])
    assert asked("mmlu_anatomy", tmp_path) == asked("mmlu_anatomy", tmp_path / "hub")
    with (tmp_path / "data" / "test" / "anatomy_test.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["Bones? " * 20_000, *"wxyz", answer])
    assert len(asked("mmlu_anatomy", tmp_path)[0]) == 8
    definitions = Definitions(["mmlu"], tmp_path)
    found = definitions.load("mmlu")
    assert list(found["tasks"]) == ["mmlu_anatomy"]
    assert "mmlu" in found["groups"]
    assert len(definitions.left_out["mmlu"]) == 56
    assert "mmlu_virology" in definitions.left_out["mmlu"]


def test_what_is_no_csv_is_said_once(tmp_path):
    for split in ("test", "dev"):
        (tmp_path / split).mkdir()
        (tmp_path / split / f"anatomy_{split}.csv").write_bytes(b"Bones?,w,x,y,z,\xff\n")
    with pytest.raises(InputError, match=r"^\S+\.csv is no CSV in UTF-8"):
        Definitions(["mmlu_anatomy"], tmp_path).load("mmlu_anatomy")


def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch):
    in_hub_layout(tmp_path, "arc_challenge")
    with pytest.raises(InputError, match="the data of arc_easy is not in"):  # a part of the same dataset is no copy
        Definitions(["arc_easy"], tmp_path).load("arc_easy")
    with pytest.raises(InputError, match="the data of mmlu is not in"):
        Definitions(["mmlu"], tmp_path).load("mmlu")
    with pytest.raises(InputError, match="is no folder"):
        Definitions(["piqa"], tmp_path / "none")
    write(tmp_path / "piqa.jsonl", [{"query": "Question: a\n", "choices": ["b"], "gold": 0}])
    with pytest.raises(InputError, match=r"piqa.jsonl has a row that is not as expected: IndexError"):
        Definitions(["piqa"], tmp_path).load("piqa")

    def unreachable(**_):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(InputError, match=r"the data of piqa is not on this machine .*; name a folder that holds it"):
        Definitions(["piqa"]).load("piqa")


@pytest.mark.slow  # it reads all of the harness's definitions
def test_other_tasks_are_known_too(tmp_path):
    with pytest.raises(InputError, match=r"no task 'winogrand'; did you mean 'winogrande'\?"):
        Definitions(["winogrand"], tmp_path)
    assert Definitions(["openbookqa"]).names == ["openbookqa"]


def test_a_name_may_stand_for_several():
    assert Definitions(["paper", "piqa", "siqa", "lambada"]).names == [*TABLE, "lambada_openai"]
    assert len(TABLE) == 10
    assert [usual_shots(name) for name in ("mmlu", "triviaqa", "piqa", "unknown")] == [5, 5, 0, 0]


@pytest.mark.skipif(not OFFICIAL.exists(), reason="the published files are not here")
def test_the_published_files_give_back_their_own_prompts():
    folder = OFFICIAL / "commonsense"
    copies = LocalCopies(folder)
    for (dataset, part), (pattern, _) in FOUNDRY.items():
        (path,) = folder.glob(pattern)
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        found = copies.find({"dataset_path": dataset, "dataset_name": part, "test_split": "test"})["test"]
        assert len(found) == len(rows) > 500
        for row, made in zip(rows, found, strict=True):
            if dataset == "winogrande":
                place = made["sentence"].index("_")
                before, behind = made["sentence"][:place], made["sentence"][place + 1 :]
                assert [before + made[f"option{n}"] for n in (1, 2)] == row["context_options"]
                assert behind.strip() == row["continuation"].strip()
                assert int(made["answer"]) - 1 == row["gold"]
            elif dataset == "super_glue":
                assert f"Passage: {made['passage']}\nQuestion: {made['question']}?" == row["query"]
            elif dataset == "ai2_arc":
                assert made["choices"]["label"].index(made["answerKey"]) == row["gold"]
                assert made["choices"]["text"] == row["choices"]
