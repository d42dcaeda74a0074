"""Recall in prose: what the sequences are, and that a model's choices are counted by definition."""

import dataclasses
import json
import re

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import ByteTokenizer, Megalodon, ModelConfig
from megalodon_lm.data.books import bundled
from megalodon_lm.data.subword import SubwordTokenizer, train_bpe
from megalodon_lm.errors import InputError
from megalodon_lm.evaluation import recall_zero_shot
from megalodon_lm.evaluation.recall import Answers, answer
from megalodon_lm.evaluation.recall_prose import CHOICES, HIDDEN, PASSKEY, PROSE_TASKS, Prose, ProseTask
from megalodon_lm.evaluation.recall_prose_report import by_reader, draw, draw_depths, margin
from megalodon_lm.evaluation.recall_zero_shot import Found, ProseTrial, find, find_all

from .processes import megalodon

BYTES = ByteTokenizer()
TEXT = " ".join(f"Sentence number {n} says nothing! Does it? It does not." for n in range(300)).encode()
PROSE = Prose([TEXT], BYTES)
CHUNK = 160
CASES = [(name, question) for name in PROSE_TASKS for question in ("after", "before")]


@pytest.fixture(scope="module")
def subwords():
    content = train_bpe([TEXT.decode(), " The violin is hidden in the orchard. What is the pass key? 71432"], 300)
    return Prose([TEXT], SubwordTokenizer(content))


def task(name="needle", prose=PROSE, chunk=CHUNK, question="after", needles=None):
    return ProseTask(name, prose, chunk, needles or (3 if name == "needles" else 1), question)


def tiny():
    torch.manual_seed(0)
    sizes = dict(num_layers=1, model_dim=32, z_dim=16, value_dim=32, ffn_hidden_dim=32, cema_ndim=4, chunk_size=32)
    return Megalodon(ModelConfig.named("tiny", **sizes)).eval()


def places():
    distance, depth = st.integers(0, 4), st.sampled_from([0.0, 0.5, 0.75])
    return st.tuples(st.sampled_from(CASES), distance, depth, st.integers(0, 2**40), st.booleans())


def oracle(name, text, asked):
    """What stands in the needle about what the question names, by a reader of the text."""
    if name == "passkey":
        return re.findall(r"The pass key is( \d{5})\.", text)
    thing = re.fullmatch(r"Where is the (\w+) hidden\?", asked)[1]
    return re.findall(rf" The {thing} is hidden in the( \w+)\.", text)


@settings(max_examples=40, deadline=None)
@given(places())
def test_who_reads_the_text_knows_the_answer_and_no_other_choice_is_said_of_it(subwords, place):
    (name, question), distance, depth, seed, in_bytes = place
    prose = PROSE if in_bytes else subwords
    of = task(name, prose, CHUNK if in_bytes else 100, question)
    if not of.fits(distance, depth):
        assert name == "needles" or distance == 0, "one needle fits anywhere beyond its chunk"
        return
    tokens, targets, learnt, choices = of.sequences(CHOICES, distance, (seed,), depth)
    assert choices == CHOICES
    rights, decode = [], prose.tokenizer.decode
    for block in range(0, CHOICES * CHOICES, CHOICES):
        texts, answers = [], []
        for row in range(block, block + CHOICES):
            first = int(learnt[row].int().argmax())
            said = targets[row][learnt[row]]
            assert torch.equal(tokens[row, first + 1 : first + len(said)], said[:-1]), "it is read as it is scored"
            texts.append(tokens[row, : first + 1].tolist())
            answers.append(decode(said.tolist()))
        assert all(text == texts[0] for text in texts), "choices share all that comes before"
        text = decode(texts[0])
        assert text.endswith((" hidden in the", "The pass key is"))
        body = text[: text.rindex("\n\n")]
        asked = body.split("\n\n")[0] if question == "before" else re.search(r"\n\n(W.*\?) \w", text)[1]
        assert oracle(name, body, asked) == [answers[0]]
        assert len(set(answers)) == CHOICES
        assert body.count(f"{answers[0]}.") == 1, "the answer stands nowhere else"
        assert body.count("hidden in the") == (of.needles if name != "passkey" else 0)
        if question == "before":
            assert "?" not in text[text.rindex("\n\n") :], "at the end nothing says what is asked"
        needle = len(prose.tokenizer.encode(body[: body.index(f"{answers[0]}.")], begin=True)) if in_bytes else None
        if in_bytes:
            end = len(BYTES.encode(body, begin=True))
            assert end // CHUNK - needle // CHUNK == distance or distance == 0
            assert distance == 0 or end == of.context(distance, depth)
            assert needle // CHUNK == of.begins_at(distance, depth) // CHUNK
        rights.append(answers[0])
    assert len(set(rights)) == CHOICES, "each choice is the right one once"


def test_the_answers_are_in_no_novel_that_they_are_hidden_in():
    novel = b" ".join(bundled("validation").values()).decode().lower()
    for word in (*HIDDEN.subjects, *(a.strip() for a in HIDDEN.answers)):
        assert word not in novel
    assert not re.findall(r"\d{5}", novel)
    assert all(len(a) == 6 for a in PASSKEY.answers)
    assert len(PASSKEY.answers) > 1000


def test_sequences_are_those_of_their_seed_and_differ_only_in_the_answer():
    first, again = (task().sequences(CHOICES, 2, (7,), 0.5) for _ in range(2))
    assert all(map(torch.equal, first[:3], again[:3]))
    assert not torch.equal(first.tokens, task().sequences(CHOICES, 2, (8,), 0.5).tokens)
    texts = [BYTES.decode(row.tolist()) for row in first.tokens[::CHOICES, : 4 * CHUNK]]
    bare = {re.sub(r"in the \w+\.", "", text)[: 3 * CHUNK] for text in texts}
    assert len(set(texts)) == CHOICES
    assert len(bare) == 1


def test_what_does_not_fit():
    assert task().fits(0)
    assert not task(chunk=80).fits(0)
    assert task(chunk=80).fits(1)
    assert not task().fits(-1)
    assert not task("needles").fits(0)
    assert not task("needles").fits(1)
    assert task("needles").fits(1, 0.75)
    with pytest.raises(InputError, match="9 needles must be at least 1 and at most 8"):
        task("needles", needles=9)
    with pytest.raises(InputError, match="2 needles must be at least 1 and at most 1 for needle"):
        task("needle", needles=2)
    with pytest.raises(InputError, match="no task 'nedle'; did you mean 'needle'"):
        task("nedle")
    with pytest.raises(InputError, match=r"tokens of prose are more than the .* take smaller distances or depths"):
        task().sequences(CHOICES, 200, (0,), 0.0)
    with pytest.raises(InputError, match="depth 1 must be at least 0 and below 1"):
        ProseTrial("tiny", tiny(), task(), 1, 1, 1)


@pytest.mark.parametrize("distance", [0, 2])
def test_choices_are_scored_as_if_each_were_read_whole(distance):
    """The shared beginning is read once; losses are those of every sequence by itself, without its padding."""
    model, sequences = tiny(), task("passkey").sequences(CHOICES, distance, (3,), 0.5)
    found = answer(model, sequences, "float32")
    begin = sequences.tokens.shape[1] - found.nats.shape[1]
    for row in (0, 5, 8, 63):
        tokens, targets, learnt = (t[row : row + 1] for t in sequences[:3])
        last = int(learnt.nonzero()[-1, 1]) + 1
        logits = model(tokens[:, :last])[0].double()
        nats = torch.nn.functional.cross_entropy(logits[0], targets[0, :last], reduction="none")
        expected = torch.where(learnt[0, :last], nats, 0.0)[begin:]
        assert torch.allclose(found.nats[row, : last - begin], expected, atol=1e-4)
        assert found.nats[row].sum() > 1
        hits = (logits[0].argmax(-1) == targets[0, :last]) & learnt[0, :last]
        assert torch.equal(found.hits[row, : last - begin], hits[begin:])


def test_what_is_counted(monkeypatch):
    """A reader that knows half of the texts, over strong likings of its own; the likings fall out of the margin."""
    trial = ProseTrial("half", tiny(), task(), 1, 0.0, texts=200)
    random = np.random.default_rng(0)

    def half(model, sequences, precision):
        rows = len(sequences.tokens) // CHOICES
        said = [BYTES.decode(t[m].tolist()) for t, m in zip(sequences.targets, sequences.learnt, strict=True)]
        liking = np.array([len(answer) * 3.0 + sum(answer.encode()) % 17 for answer in said]).reshape(rows, CHOICES)
        knows = (np.arange(rows) // CHOICES % 2 == 0) * 60.0
        liking[:, 0] += knows
        nats = torch.zeros(sequences.tokens.shape, dtype=torch.float64)
        nats[:, -1] = torch.from_numpy(-liking.flatten() + random.normal(0, 1e-3, rows * CHOICES))
        hits = sequences.learnt & torch.from_numpy(np.repeat(knows > 0, CHOICES))[:, None]
        return Answers(hits, nats, 12)

    monkeypatch.setattr(recall_zero_shot, "answer", half)
    monkeypatch.setattr(recall_zero_shot, "BLOCK_TOKENS", CHOICES * CHUNK * 50)
    found = find(trial)
    assert found.exact == 800
    assert found.margin == pytest.approx(30, abs=0.01)
    assert found.margin_error == pytest.approx(30 / 200**0.5, rel=0.05)
    assert 800 + 100 * 0.9 <= found.right <= 800 + 100 * 1.1, "of the others, the one liked best is right: 1 in 8"
    assert found.state_bytes == 12


def test_trials_are_kept_and_told_apart(tmp_path):
    trials = [ProseTrial("tiny", tiny(), task(), distance, 0.0, 1) for distance in (1, 2)]
    found = list(find_all(trials, tmp_path))
    changed = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    again = list(find_all(trials, tmp_path))
    assert [f.figures() for f in again] == [f.figures() for f in found]
    assert {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == changed
    other = tiny()
    with torch.no_grad():
        other.embed.weight[0, 0] += 1
    with pytest.raises(InputError, match="is a trial with other settings"):
        list(find_all([dataclasses.replace(trials[0], model=other)], tmp_path))


def test_pictures_and_tables_of_places(tmp_path):
    found = []
    for name in ("one", "two"):
        for distance in (0, 1, 16):
            for depth in (0.0, 0.5):
                trial = ProseTrial(name, tiny(), task(), distance, depth, 2)
                found.append(Found(trial, 16 - distance, 3, 1.0 + depth, 0.3, 9.0, 100, 1.0, {}))
    readers = by_reader(found[:-1])
    assert [(r.name, r.distances, r.depths) for r in readers] == [(n, [0, 1, 16], [0.0, 0.5]) for n in ("one", "two")]
    assert margin(readers[0].at(1)) == pytest.approx((1.25, 0.3 / 2**0.5))
    draw(tmp_path / "a.png", readers)
    draw_depths(tmp_path / "b.png", readers)
    assert all((tmp_path / name).stat().st_size > 10_000 for name in ("a.png", "b.png"))


def test_the_command(tmp_path):
    """A trained model is asked in prose; what does not fit is refused in one line."""
    tiny().save(tmp_path / "model")
    BYTES.save(tmp_path / "model")
    command = ["evaluate", "recall", "--trained", "model", "own=model", "--sequences", 1, "--out", "found"]
    few = ["--depths", 0, "--distances", 1, "--chunk-size", 160]
    result = megalodon(*command, *few, "--task", "needle", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    trials = json.loads((tmp_path / "found" / "recall.json").read_text())["trials"]
    assert [(t["model"], t["task"], t["distance"], t["rows"]) for t in trials] == [
        ("model", "needle", 1, 8),
        ("own", "needle", 1, 8),
    ]
    assert (tmp_path / "found" / "depths.png").exists()
    assert "guessing gives 12.5% and 0 nats" in result.stdout
    shown = [p.read_bytes() for p in (tmp_path / "found").iterdir()]
    (tmp_path / "model").rename(tmp_path / "gone")
    again = megalodon(*command, *few, "--task", "needle", "--finished", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert again.stdout == result.stdout
    assert [p.read_bytes() for p in (tmp_path / "found").iterdir()] == shown
    other = megalodon(*command, *few, "--task", "needle", "--finished", "--precision", "bf16", cwd=tmp_path)
    assert other.returncode == 2
    assert "is a trial with other settings" in other.stderr
    (tmp_path / "gone").rename(tmp_path / "model")
    for options, says in (
        (["--task", "needle", "mqar"], "are asked apart from those learnt"),
        (["--task", "mqar"], "--trained takes models for the tasks"),
        (["--task", "needle", "--distances", -1], "no sequences of these --distances"),
        (["--task", "needle", "--depths", 1.5], "depth 1.5 must be"),
        (["--task", "needles", "--pairs", 9], "9 needles must be"),
        (["--task", "needle", "--trained", "model", "own/../model"], "'model' comes twice; write NAME=FOLDER"),
        (["--task", "needle", "--trained", "a/b=model"], "a name has no slashes"),
    ):
        result = megalodon(*command, *options, cwd=tmp_path)
        assert result.returncode == 2, result.stderr
        assert says in result.stderr
        assert result.stderr.count("\n") == 1
