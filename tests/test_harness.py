"""The harness asks any model: exactly, at any length, and what prompts share is read once."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megalodon_lm import ByteTokenizer, Generator
from megalodon_lm.architectures import build
from megalodon_lm.data.chat import Message, encode_chat
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.harness import HarnessModel
from megalodon_lm.evaluation.results import Results
from megalodon_lm.evaluation.short_tasks import ask
from megalodon_lm.evaluation.task_definitions import Definitions, usual_shots
from megalodon_lm.generation.sampling import Sampling

from . import reading
from .test_architectures import EVERY, made

BYTES = ByteTokenizer()
TEXT = reading.TEXT.decode("ascii", "ignore")
FOLDER = Path(__file__).parent / "files" / "tasks"


ROOM = {"llama": {"window": 8192}}  # for all that is asked


def roomy(name, dtype=torch.float64):
    return made(name, dtype, **ROOM.get(name, {}))


def harness(name, **options):
    return HarnessModel(roomy(name, torch.float32), BYTES, "float32", **options)


def requests(*arguments):
    return [SimpleNamespace(args=given) for given in arguments]


def questions(task="mmlu_marketing", shots=5):
    """The requests of a task, question by question."""
    (task,) = Definitions([task], FOLDER).load(task)["tasks"].values()
    task.set_config("num_fewshot", shots)
    task.set_fewshot_seed(0)
    task.build_all_requests()
    found = {}
    for request in task.instances:
        found.setdefault(request.doc_id, []).append(request)
    return list(found.values())


@pytest.mark.parametrize("name", EVERY)
def test_log_likelihoods_are_exact(name):
    lm, model = harness(name), roomy(name)  # in float64
    asked = [
        ("", TEXT[:5]),
        (TEXT[:700], TEXT[700:720]),
        (TEXT[:700], " x"),
        (TEXT[:30] + "  ", "y"),
        (TEXT[:511], "z"),
    ]
    for (context, continuation), (found, greedy) in zip(asked, lm.loglikelihood(requests(*asked)), strict=True):
        space = context[len(context.rstrip()) :]
        before, target = BYTES.encode(context.rstrip(), begin=True), BYTES.encode(space + continuation)
        with torch.no_grad():
            logits, _ = model(torch.from_numpy(np.concatenate([before, target]))[None])
        scores = logits[0, len(before) - 1 : -1].log_softmax(-1)
        assert found == pytest.approx(
            scores[torch.arange(len(target)), torch.from_numpy(target)].sum().item(), abs=1e-3
        )
        assert greedy == bool((scores.argmax(-1).numpy() == target).all())


@pytest.mark.parametrize("name", ["megalodon", "llama"])
def test_few_shot_prompts_are_read_once_with_the_same_scores(name):
    """To the last bit those of every question asked by itself."""
    asked = questions()
    together = harness(name)
    found = together.loglikelihood([request for question in asked for request in question])
    apart, computed = [], 0
    for question in asked:
        alone = harness(name)
        apart += alone.loglikelihood(question)
        computed += alone.reader.work.computed
    assert found == apart
    assert len({score for score, _ in found}) > len(asked)
    work = together.reader.work
    assert work.anew == sum(len(BYTES.encode(f"{c}{a}", begin=True)) - 1 for q in asked for c, a in (r.args for r in q))
    assert work.computed < computed < work.anew / 3.9
    assert work.saving > 5


def test_a_text_of_any_length_is_scored_whole():
    lm = harness("megalodon")
    text = (TEXT * 2)[:5000]
    (found, nothing) = lm.loglikelihood_rolling(requests((text,), ("",)))
    tokens = torch.from_numpy(BYTES.encode(text, begin=True))[None]
    with torch.no_grad():
        losses, _ = made("megalodon")(tokens[:, :-1], targets=tokens[:, 1:], reduction="none")
    assert found == pytest.approx(-losses.sum().item(), rel=1e-5)
    assert nothing == 0
    assert lm.reader.work.computed == lm.reader.work.anew == 5000
    assert lm.cut.requests == 0
    first = lm.loglikelihood(requests((text, "a")))
    assert first != lm.loglikelihood(requests(("b" + text[1:], "a")))  # even its first letter counts


def test_writing_ends_where_the_task_says():
    lm = harness("megalodon")
    prompts = [TEXT[:600], TEXT[:600], TEXT[:40]]
    settings = [{"until": ["\n", "."], "max_gen_toks": 12}, {"until": "e"}, {"max_gen_toks": 5, "do_sample": False}]
    found = lm.generate_until(requests(*zip(prompts, settings, strict=True)))
    writer = Generator(lm.reader.model, BYTES, "float32")
    for text, prompt, (stop, most) in zip(found, prompts, [(("\n", "."), 12), (("e",), 256), ((), 5)], strict=True):
        sampling = Sampling(max_tokens=most, temperature=0, stop=stop)
        assert [text] == writer.write([prompt], sampling)
    for setting, says in (("num_beams", "known here are until"), ("max_gen_toks", "must be at least 1")):
        with pytest.raises(InputError, match=says):
            lm.generate_until(requests((TEXT[:9], {setting: 0})))


def test_what_a_task_draws_depends_on_its_prompt_and_the_seed_alone():
    setting = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 40, "max_gen_toks": 12, "until": []}
    asked = [(TEXT[:30], setting), (TEXT[:50], setting), (TEXT[:30], setting), (TEXT[:70], {"max_gen_toks": 3})]
    lm = harness("megalodon", seed=1)
    found = lm.generate_until(requests(*asked))
    assert found[0] != found[2]  # asked twice, drawn twice
    assert lm.generate_until(requests(*asked[1:3])) == [found[1], found[0]]
    assert lm.generate_until(requests(asked[3])) == [found[3]]
    assert harness("megalodon", seed=2).generate_until(requests(asked[0])) != [found[0]]
    (greedy,) = lm.generate_until(requests((TEXT[:30], {"max_gen_toks": 12})))
    assert found[0] != greedy
    for other in ({"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}, {"do_sample": False}, {"temperature": 0}):
        assert lm.generate_until(requests((TEXT[:30], setting | other))) == [greedy]
    drawn = {"temperature": 0.9, "max_gen_toks": 12, "top_k": -1, "top_p": None}  # as other classes understand it
    assert lm.generate_until(requests((TEXT[:30], drawn))) != [greedy]


def test_a_chat_is_one_as_in_training():
    lm = harness("megalodon")
    chat = [{"role": "system", "content": "Be brief.\ue0e0"}, {"role": "user", "content": "Who?"}]
    opened = lm.tok_encode(lm.apply_chat_template(chat))
    whole, _ = encode_chat([Message("system", "Be brief."), Message("user", "Who?")], BYTES)
    assert opened == [*whole, *BYTES.encode("assistant\n")]
    chat.append({"role": "assistant", "content": "The answer is"})
    assert lm.tok_encode(lm.apply_chat_template(chat, add_generation_prompt=False)) == [
        *whole, *BYTES.encode("assistant\nThe answer is")
    ]  # fmt: skip


def test_what_a_window_has_no_room_for_is_cut_and_said():
    small = build(replace(made("llama").config, window=64)).eval()
    lm = HarnessModel(small, BYTES, "float32")
    long, short = lm.loglikelihood(requests((TEXT[:100], "abc"), (TEXT[:50], "abc")))
    assert (lm.cut.requests, lm.cut.tokens) == (1, 101 + 2 - 64)
    with torch.no_grad():
        logits, _ = small(torch.from_numpy(BYTES.encode(TEXT[:100] + "abc")[-65:-1])[None])
    expected = logits[0, -3:].log_softmax(-1)[torch.arange(3), torch.tensor(list(b"abc"))].sum().item()
    assert long[0] == pytest.approx(expected, abs=1e-4)
    assert short != long
    lm.generate_until(requests((TEXT[:80], {"max_gen_toks": 4})))
    assert (lm.cut.requests, lm.cut.tokens) == (2, 39 + 21)
    with pytest.raises(InputError, match="a window of 64 tokens has no room for 256 behind a context"):
        lm.generate_until(requests((TEXT[:80], {})))
    (rolled,) = lm.loglikelihood_rolling(requests((TEXT[:150],)))
    tokens = torch.from_numpy(BYTES.encode(TEXT[:150], begin=True))
    nats = 0.0
    for at in (0, 64, 128):
        row = tokens[None, at : at + 65]
        with torch.no_grad():
            losses, _ = small(row[:, :-1], targets=row[:, 1:], reduction="none")
        nats += losses.sum().item()
    assert rolled == pytest.approx(-nats, rel=1e-5)
    assert (lm.cut.requests, lm.cut.tokens) == (3, 39 + 21 + 86)


def test_a_part_of_mmlu_has_the_solved_examples_of_the_whole():
    assert [usual_shots(name) for name in ("mmlu", "mmlu_anatomy", "nq_open", "winogrande", "other")] == [5, 5, 5, 0, 0]


def test_tasks_give_results():
    watched = []
    lm = harness("megalodon", watch=lambda done, total: watched.append((done, total)))
    definitions = Definitions(["winogrande", "mmlu", "nq_open"], FOLDER)
    tasks = ask(lm, definitions, shots=None, limit=2)
    results = [next(tasks), next(tasks)]
    with pytest.raises(InputError, match="nq_open: 5 shots need as many solved examples, and the data has 0"):
        next(tasks)
    (written,) = ask(lm, Definitions(["nq_open"], FOLDER), shots=0, limit=1)
    grande, mmlu = results
    assert (grande.task, grande.shots, grande.samples, grande.headline) == ("winogrande", 0, 2, "acc")
    assert grande.scores["acc"].value in (0, 0.5, 1)
    assert grande.scores["acc"].standard_error == pytest.approx(0.5 if grande.scores["acc"].value == 0.5 else 0)
    assert (mmlu.task, mmlu.version, mmlu.shots, mmlu.samples) == ("mmlu", "2", 5, 4)
    assert mmlu.tokens_reread > 3 * mmlu.tokens_computed > 0
    assert len(mmlu.notes["left out"]) == 55
    parts = mmlu.notes["parts"]
    mean = sum(parts[f"mmlu_{s}"]["scores"]["acc"].value for s in ("marketing", "us_foreign_policy")) / 2
    assert mmlu.scores["acc"].value == mean
    assert (written.headline, written.scores["exact_match"].value) == ("exact_match", 0)
    assert watched[-1] == (1, 1)
    assert (16, 16) in watched


OFFLINE = """
import socket, sys
def refuse(*_, **__):
    raise AssertionError("the network was asked")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = refuse
from megalodon_lm.cli.main import main
main(sys.argv[1:])
assert "transformers" not in sys.modules
"""


def test_a_command_evaluates_offline_and_another_compares(saved, tmp_path):
    BYTES.save(saved)
    out = tmp_path / "results.json"
    command = [
        "evaluate", "tasks", "winogrande,mmlu_marketing", saved, "--data", FOLDER, "--shots", "0", "--limit", "2",
        "--name", "mine", "--out", out,
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", OFFLINE, *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "winogrande" in done.stdout
    found = Results.load(out)
    assert [task.task for task in found.tasks] == ["winogrande", "mmlu_marketing"]
    assert found.model == json.loads(out.read_text())["model"]
    assert found.settings["limit"] == 2
    assert found.packages["lm_eval"].startswith("0.4")
    shown = subprocess.run(
        [sys.executable, "-m", "megalodon_lm", "evaluate", "report", out, out],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert shown.count("mine") == 2
    assert "Megalodon-7B, published" in shown


def test_the_example_of_the_docs_runs(capsys):
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    example = page.split("### From Python\n\n```python\n")[1].split("```")[0]
    exec(example, {"model": made("llama", torch.float32), "tokenizer": BYTES, "folder": FOLDER})
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["winogrande", "mmlu"]
