"""What was read once gives each question what reading everything anew gives it, to the last bit."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import ByteTokenizer, Generator
from megalodon_lm.evaluation.read_once import Reader, window_of
from megalodon_lm.generation.sampling import Sampling

from .reading import TEXT
from .test_architectures import EVERY, made

BYTES = ByteTokenizer()
QUESTIONS = [b"\n\nWho came?", b"\n\nWhere is the castle, and who lives in it?", b"\n\n" + TEXT[3000:3600]]
ANSWERS = [BYTES.encode(b) for b in (b" The Count", b" C", b" nobody at all", b" in the castle")]


def reader(name):
    return Reader(made(name, torch.float32), BYTES, "float32")


def prompts(length):
    return [np.concatenate([BYTES.encode(TEXT[:length], begin=True), BYTES.encode(q)]) for q in QUESTIONS]


@pytest.mark.parametrize("name", EVERY)
def test_questions_share_a_document(name):
    """At a piece's end and elsewhere, with questions that end in the same piece as the document, and beyond it."""
    for length in (511, 700) if name == "megalodon" else (700,):
        shared = reader(name)
        texts = prompts(length)
        found = {number: (shared.score(c, ANSWERS), shared.write([c], 5, ["."])) for number, c in shared.each(texts)}
        assert sorted(found) == [0, 1, 2]
        anew = 0
        for number, text in enumerate(texts):
            alone = reader(name)
            context = alone.read(text)
            assert found[number] == (alone.score(context, ANSWERS), alone.write([context], 5, ["."]))
            anew += alone.work.anew
        assert shared.work.anew == anew


@pytest.mark.parametrize("name", ["megalodon", "llama"])
def test_scores_are_log_likelihoods(name):
    alone = reader(name)
    text = prompts(300)[0]
    context = alone.read(text)
    for answer, score in zip(ANSWERS, alone.score(context, ANSWERS), strict=True):
        whole = torch.from_numpy(np.concatenate([text, answer]))[None]
        with torch.no_grad():
            logits, _ = made(name)(whole)
        scores = logits[0, len(text) - 1 : -1].log_softmax(-1)
        expected = scores[torch.arange(len(answer)), whole[0, len(text) :]].sum().item()
        assert score.log_likelihood == pytest.approx(expected, abs=1e-3)
        assert score.greedy == bool((scores.argmax(-1) == whole[0, len(text) :]).all())
    [said] = alone.write([context], 12)
    assert context.position == len(text)
    written = Generator(alone.model, BYTES, "float32").write([alone.read(text)], Sampling(max_tokens=12, temperature=0))
    assert [said] == written
    likeliest = list(Generator(alone.model, BYTES, "float32").stream([context], Sampling(max_tokens=5, temperature=0)))
    [score] = alone.score(alone.read(text), [np.array([delta.token for delta in likeliest])])
    assert score.greedy


def test_a_long_continuation_is_scored_in_pieces(monkeypatch):
    alone = reader("megalodon")
    context, long = alone.read(prompts(300)[0]), [BYTES.encode(TEXT[4000:4100]), ANSWERS[0]]
    expected = alone.score(context, long)
    monkeypatch.setattr("megalodon_lm.evaluation.read_once.MAX_PIECE_LENGTH", 7)
    for found, score in zip(alone.score(context, long), expected, strict=True):
        assert found.log_likelihood == pytest.approx(score.log_likelihood, abs=1e-3)
        assert found.greedy == score.greedy
    assert alone.score(context, []) == []


def test_computed_tokens_are_counted(monkeypatch):
    """All of them: an architecture that compiled steps do not run passes each through forward."""
    counted, forward = 0, type(made("llama")).forward

    def counting(self, tokens, *args, **kwargs):
        nonlocal counted
        counted += tokens.numel()
        return forward(self, tokens, *args, **kwargs)

    monkeypatch.setattr(type(made("llama")), "forward", counting)
    shared = reader("llama")
    for _, context in shared.each(prompts(1500)):
        assert shared.work.computed == counted
        shared.score(context, ANSWERS)
        assert shared.work.computed == counted
        shared.write([context], 5)
        assert shared.work.computed == counted
    assert shared.work.anew > 5 * 3 * 1500
    assert shared.work.saving == shared.work.anew / counted > 4


@given(
    st.lists(st.lists(st.integers(0, 1), max_size=5), min_size=1, max_size=5),
    st.integers(0, 1),
)
@settings(max_examples=10, deadline=None)
def test_every_text_is_read_once_whatever_they_share(branches, shared_pieces):
    """Texts of a tree that branches at random, some the same, some the beginning of others."""
    stems = [BYTES.encode(TEXT[at : at + 300]) for at in (0, 1000)]
    begin = BYTES.encode(TEXT[: 512 * shared_pieces], begin=True)
    texts = [np.concatenate([begin, *(stems[b] for b in branch)]) for branch in branches]
    small = reader("llama")
    seen = set()
    for number, context in small.each(texts):
        seen.add(number)
        assert context.position == len(texts[number])
        whole = reader("llama").read(texts[number])
        assert (context.loss(), context.waiting) == (whole.loss(), whole.waiting)
        assert torch.equal(context.finish()[0], whole.finish()[0])
    assert seen == set(range(len(texts)))
    pieces = {t[:end].tobytes() for t in texts for end in range(512, len(t), 512)}
    assert small.work.computed == 512 * len(pieces)


def test_texts_that_part_at_several_places():
    """One at the end of what another two share, and one before that: what all share is read once."""
    begin = BYTES.encode(TEXT[:2000], begin=True)
    small = reader("llama")
    found = [
        c.position for _, c in small.each([np.append(begin, BYTES.encode(end)) for end in ("aab", "aac", "ad", "b")])
    ]
    assert found == [2004, 2004, 2003, 2002]
    assert small.work.computed == 512 * 3


def test_the_example_of_the_documentation(tiny, capsys):
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    [code] = [c for c in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "Reader(model" in c]
    names = {"model": tiny, "tokenizer": BYTES, "text": TEXT[:600], "questions": [b"Who?", b"Why?"], "answers": [b"He"]}
    exec(code, names)
    computed, anew = map(int, capsys.readouterr().out.split())
    assert computed < anew


def test_a_window_is_known():
    assert window_of(made("llama")) == 12
    assert window_of(made("megalodon")) is None
