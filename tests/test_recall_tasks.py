"""Recall's sequences: what they are, token by token, and that nothing but reading them gives the answers."""

import hashlib
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.errors import InputError
from megalodon_lm.evaluation.recall_tasks import CUE, KINDS, SYMBOLS, TASKS, VOCAB_SIZE, AssociativeRecall, find_task

KEYS, VALUES, FILLER = range(SYMBOLS), range(SYMBOLS, 2 * SYMBOLS), range(2 * SYMBOLS, 3 * SYMBOLS)
KINDS_OF = [(name, question) for name in TASKS for question in ("after", "before")]
every_task = pytest.mark.parametrize(("name", "question"), KINDS_OF)


@pytest.mark.parametrize(
    ("pairs", "distance"),
    [(8, 0), (8, 1), (8, 4), (8, 16), (8, 64), (32, 1), (32, 4), (32, 64), (21, 0), (1, 0), (1, 2)],
)
def test_each_query_comes_exactly_so_many_chunks_after_its_key(pairs, distance):
    """Token by token: every key's value stands behind it, its query `distance` chunks later, filler all between."""
    chunk = 64
    tokens, targets, learnt, _ = AssociativeRecall(pairs, chunk).sequences(5, distance, (3,))
    for row, target, counts in zip(tokens.tolist(), targets.tolist(), learnt.tolist(), strict=True):
        place, value_of, asked = {}, {}, []
        for at, (token, answer, is_query) in enumerate(zip(row, target, counts, strict=True)):
            if token in KEYS and token not in place:
                assert not is_query
                place[token], value_of[token] = at, row[at + 1]
            elif token in KEYS:
                assert is_query
                assert at // chunk - place[token] // chunk == distance
                assert answer == value_of[token]
                asked.append(token)
            elif token in VALUES:
                assert not is_query
                assert row[at - 1] in place
                assert not asked, "no answer is ever read"
            else:
                assert token in FILLER
                assert not is_query
        assert sorted(asked) == sorted(place)
        assert len(place) == len(set(value_of.values())) == pairs
        assert all(value in VALUES for value in value_of.values())
        assert row[: 2 * pairs : 2] == list(place)
        assert row[-pairs:] == asked


def oracle(name, question, row, asked):
    """The answers, from the tokens of one row alone, by the rules of the task as a reader would say them.

    Args:
        name: of the task.
        question: after or before.
        row: tokens.
        asked: how many answers there are, at the end of the row.
    """
    cues, content = row[-asked:], row[int(question == "before") : -asked]
    wanted = cues if question == "after" else [row[0]] * asked
    if question == "before":
        assert set(cues) == {CUE}
    if name == "copying":
        kind = KEYS if set(wanted) == {KINDS[0]} else VALUES
        assert set(wanted) in ({KINDS[0]}, {KINDS[1]})
        return [t for t in content if t in kind]
    return [content[content.index(key) + 1] for key in wanted]


@every_task
@settings(max_examples=30, deadline=None)
@given(pairs=st.integers(1, 5), distance=st.integers(0, 3), seed=st.integers(0, 2**40))
def test_who_reads_the_tokens_knows_every_answer_and_no_answer_stands_elsewhere(name, question, pairs, distance, seed):
    task = find_task(name, pairs, 17, question)
    tokens, targets, learnt, choices = task.sequences(3, distance, (seed,))
    assert choices == 1
    assert tokens.min() >= 0
    assert tokens.max() < VOCAB_SIZE
    for row, target, counts in zip(tokens.tolist(), targets.tolist(), learnt.tolist(), strict=True):
        answers = [t for t, count in zip(target, counts, strict=True) if count]
        assert counts == [False] * (len(row) - len(answers)) + [True] * len(answers)
        assert oracle(name, question, row, len(answers)) == answers
        assert len(set(answers)) == len(answers)
        for answer in answers:
            assert row.count(answer) == 1, "it is read once, where it belongs"
            assert (len(row) - len(answers)) // 17 - row.index(answer) // 17 == distance
        content = [t for t in row if t not in FILLER]
        assert len(content) == task.width + (task.question == "before" and name != "copying") + (
            len(answers) if question == "after" and name != "copying" else 0
        )


@every_task
def test_the_question_stands_where_it_should(name, question):
    """Before: the first token says what is asked, and the end is the same for all questions; after: the reverse."""
    one, other = (find_task(name, 3, 32, question).sequences(200, 2, (seed,)) for seed in (0, 1))
    ends = one.tokens[one.learnt].view(200, -1)
    assert (ends == CUE).all() == (question == "before")
    assert (ends != CUE).any() == (question == "after")
    first = set(one.tokens[:, 0].tolist())
    if question == "before":
        assert first == set(KINDS) if name == "copying" else len(first) > 30
        assert torch.equal(one.tokens[:, 64:], other.tokens[:, 64:])
        for row, answer in zip(one.tokens.tolist(), one.targets[one.learnt].view(200, -1)[:, 0].tolist(), strict=True):
            assert name == "copying" or row[row.index(answer) - 1] == row[0], "it asks for the first answer"
    else:
        assert not first & {CUE, *KINDS}


@every_task
def test_order_and_place_tell_nothing_of_the_answer(name, question):
    """Where the first answer stands among those there may be is drawn evenly, and so is every answer."""
    pairs, rows = 4, 6000
    task = find_task(name, pairs, 32, question)
    tokens, targets, learnt, _ = task.sequences(rows, 1, (5,))
    answers = targets[learnt].view(rows, -1)
    if name == "copying":  # its order is the answer; which kind is asked for is not told by which comes first
        is_key = answers[:, 0] < SYMBOLS
        symbols = [[t for t in row if t < 2 * SYMBOLS] for row in tokens.tolist()]
        same = sum((row[0] < SYMBOLS) == key for row, key in zip(symbols, is_key.tolist(), strict=True))
        assert abs(same - rows / 2) < 6 * math.sqrt(rows / 4)
        counts = Counter(answers[:, 0].tolist())
        assert len(counts) == 2 * SYMBOLS
    else:
        place = (tokens[:, : 2 * pairs + 2] == answers[:, :1]).int().argmax(1) - int(question == "before")
        counts = Counter(place.tolist())
        assert sorted(counts) == list(range(1, 2 * pairs, 2) if name == "mqar" else range(1, 2 * pairs + 1))
        if answers.shape[1] > 1:
            second = (tokens[:, : 2 * pairs + 2] == answers[:, 1:2]).int().argmax(1)
            assert abs(int((second > place).sum()) - rows / 2) < 6 * math.sqrt(rows / 4)
    expected = rows / len(counts)
    assert all(abs(count - expected) < 6 * math.sqrt(expected) for count in counts.values())


@every_task
def test_guessing_among_the_possible_answers_is_right_as_often_as_said(name, question):
    """A guesser that knows the possible answers: values; symbols of the kind; other tokens than the one asked for."""
    pairs, rows = 3, 4000
    task, random = find_task(name, pairs, 16, question), np.random.default_rng(1)
    tokens, targets, learnt, _ = task.sequences(rows, 0, (6,))
    right, answers = 0, targets[learnt].view(rows, -1)
    for row, answer, place in zip(
        tokens.tolist(), answers[:, 0].tolist(), learnt.int().argmax(1).tolist(), strict=True
    ):
        content = [t for t in row[task.told : place] if t not in FILLER]
        if name == "induction":
            key = row[0] if question == "before" else row[place]
            possible = [t for t in content if t != key]
        else:
            possible = [t for t in content if (t in VALUES) == (answer in VALUES)]
        right += random.choice(possible) == answer
    assert abs(right - rows * task.chance) < 5 * math.sqrt(rows * task.chance * (1 - task.chance))


@settings(deadline=None)
@given(st.sampled_from(KINDS_OF), st.integers(1, 5), st.integers(0, 5), st.integers(0, 2**40), st.integers(0, 3))
def test_sequences_are_those_of_their_seed(kind, pairs, distance, seed, step):
    name, question = kind
    task = find_task(name, pairs, 32, question)
    first, again = (task.sequences(3, distance, (seed, step)) for _ in range(2))
    assert all(map(torch.equal, first[:3], again[:3]))
    assert not torch.equal(first.tokens, task.sequences(3, distance, (seed, step + 1)).tokens)


def test_keys_values_order_and_filler_are_drawn_evenly():
    task, rows = AssociativeRecall(4, 16), 8000
    tokens, targets, *_ = task.sequences(rows, 1, (0,))
    for part, begin in ((tokens[:, 0:8:2], 0), (tokens[:, 1:8:2], SYMBOLS), (tokens[:, 8:16], 2 * SYMBOLS)):
        for column in part.T:
            counts = torch.bincount(column - begin, minlength=SYMBOLS)
            assert len(counts) == SYMBOLS
            assert ((counts - rows / SYMBOLS).abs() < 6 * math.sqrt(rows / SYMBOLS)).all()
    order = (tokens[:, None, 0:8:2] == tokens[:, 16:, None]).int().argmax(2)  # which pair each query asks for
    for place in order.T:
        assert (torch.bincount(place, minlength=4) - rows / 4).abs().max() < 6 * math.sqrt(rows / 4)
    assert torch.equal(targets[:, 16:], tokens[:, 1:8:2].gather(1, order))


def test_the_sequences_of_older_trials_are_still_the_same():
    """Their results say what a model recalls of today's sequences."""
    for pairs, distance, known in ((8, 0, "7b787e2a8f1b0ffa"), (8, 4, "724f2aaf02726ca0"), (32, 1, "6654b38cee3266ac")):
        tensors = AssociativeRecall(pairs, 64).sequences(4, distance, (1, 0, distance))[:3]
        assert hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()[:16] == known


def test_what_does_not_fit():
    assert AssociativeRecall(21, 64).fits(0)
    assert not AssociativeRecall(22, 64).fits(0)
    assert AssociativeRecall(31, 64, "before").fits(0)
    assert AssociativeRecall(32, 64).fits(1)
    assert not AssociativeRecall(1, 64).fits(-1)
    with pytest.raises(InputError, match="33 pairs take 66 tokens, more than a chunk of 64"):
        AssociativeRecall(33, 64)
    with pytest.raises(InputError, match="32 pairs take 65 tokens, more than a chunk of 64"):
        AssociativeRecall(32, 64, "before")
    with pytest.raises(InputError, match="65 pairs must be at least 1 and at most the 64 keys"):
        AssociativeRecall(65, 1024)
    with pytest.raises(InputError, match="64 pairs must be at least 1 and at most 63 for induction"):
        find_task("induction", 64, 1024)
    with pytest.raises(InputError, match="no task 'mqra'; did you mean 'mqar'"):
        find_task("mqra", 1, 16)
    with pytest.raises(InputError, match="question 'first' must be one of after, before"):
        find_task("mqar", 1, 16, "first")
