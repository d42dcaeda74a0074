import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm import Megalodon, ModelConfig
from megalodon_lm.data.batches import SequentialBatches, ShuffledBatches, prefetched
from megalodon_lm.data.mixture import Mixture, in_memory

BEGIN = 256


def documents(*lengths, first=0):
    """Documents behind begin tokens; every byte differs from its neighbours."""
    return [np.array([BEGIN, *((np.arange(n) + 10 * i + first) % 256)]) for i, n in enumerate(lengths)]


def take(batches, count, cursor=None):
    cursor = batches.begin() if cursor is None else cursor
    found = []
    for _ in range(count):
        found.append(batches.read(cursor))
        cursor = found[-1].cursor
    return found


def whole(mixture):
    return mixture.sequences[0].read(0, len(mixture.sequences[0]))[0]


def beginning(starts, row, rows):
    """Where a row begins: with the document at its even share of the text, unless the row before it is there."""
    share = len(starts) // rows
    document = max(at for at in range(row * share + 1) if starts[at])
    return document if document > (row - 1) * share else row * share


@settings(deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 6), st.integers(0, 3))
def test_rows_begin_with_documents_and_none_where_another_does(lengths, rows, seed):
    mixture = Mixture([in_memory(documents(*lengths), seed)])
    found = [row["at"][0] for row in SequentialBatches(mixture, rows, 1).begin()]
    starts = whole(mixture) == BEGIN
    assert found == [beginning(starts, row, rows) for row in range(rows)]
    if len(starts) >= rows:
        assert found == sorted(set(found))


def test_rows_of_equal_documents_come_to_their_ends_together():
    mixture = Mixture([in_memory(documents(*[19] * 11), seed=0)])
    for batch in take(SequentialBatches(mixture, batch_size=4, length=8), 20):
        assert batch.starts is None or torch.equal(batch.starts, batch.starts[:1].expand(4, -1))


def test_stream_reads_each_row_in_order_and_marks_documents():
    mixture = Mixture([in_memory(documents(10, 17, 5), seed=1)])
    batches = take(SequentialBatches(mixture, batch_size=2, length=7), 5)
    flat = whole(mixture)
    for row in range(2):
        read = torch.cat([b.inputs[row] for b in batches])
        begin = beginning(flat == BEGIN, row, 2)
        assert read.tolist() == [flat[(begin + i) % len(flat)] for i in range(35)]
        targets = torch.cat([b.targets[row] for b in batches])
        assert torch.equal(targets[:-1], read[1:])
        starts = torch.cat([torch.zeros(7).bool() if b.starts is None else b.starts[row] for b in batches])
        assert torch.equal(starts, read == BEGIN)


def test_windows_of_an_epoch_are_all_different_and_cover_the_text():
    mixture = Mixture([in_memory(documents(30, 19, 50), seed=1)])
    windows = ShuffledBatches(mixture, batch_size=2, length=10, seed=3)
    flat = whole(mixture)
    batches = take(windows, 5)
    seen = sorted(tuple(row.tolist()) for b in batches for row in b.inputs)
    assert seen == sorted(tuple(flat[at : at + 10]) for at in range(0, 100, 10))
    again = sorted(tuple(row.tolist()) for b in take(windows, 5, batches[-1].cursor) for row in b.inputs)
    assert again == seen
    assert [b.inputs.tolist() for b in batches] != [b.inputs.tolist() for b in take(windows, 5, batches[-1].cursor)]
    for b in batches:
        assert torch.equal(b.inputs == BEGIN, torch.zeros(2, 10).bool() if b.starts is None else b.starts)


@settings(deadline=None, max_examples=30)
@given(st.booleans(), st.integers(1, 3), st.integers(0, 12), st.integers(1, 5))
def test_going_on_from_a_place_gives_the_same_batches(shuffled, sources, before, batch_size):
    mixture = Mixture([in_memory(documents(40, 3, 25, first=50 * i), seed=i) for i in range(sources)])
    make = ShuffledBatches if shuffled else SequentialBatches
    batches = make(mixture, batch_size, 8, *([7] if shuffled else []))
    expected = take(batches, before + 3)
    cursor = json.loads(json.dumps(expected[before - 1].cursor if before else batches.begin()))
    resumed = prefetched(make(mixture, batch_size, 8, *([7] if shuffled else [])), cursor)
    for e in expected[before:]:
        found = next(resumed)
        assert torch.equal(found.inputs, e.inputs)
        assert torch.equal(found.targets, e.targets)
        assert (found.starts is None) == (e.starts is None)
        assert found.cursor == e.cursor
    resumed.close()


@pytest.mark.parametrize("shuffled", [False, True])
def test_mixture_takes_by_weight(shuffled):
    mixture = Mixture([in_memory([np.array([BEGIN, *[i] * 9])] * 30, seed=0) for i in range(2)], [3.0, 1.0])
    batches = ShuffledBatches(mixture, 1, 10, 0) if shuffled else SequentialBatches(mixture, 1, 10)
    tokens = torch.cat([b.inputs[0] for b in take(batches, 100)])
    zeros, ones = ((tokens == value).sum().item() for value in (0, 1))
    assert 2.8 < zeros / ones < 3.2


def test_ranks_share_the_rows():
    mixture = Mixture([in_memory(documents(300), seed=0)])
    for make in (lambda *r: SequentialBatches(mixture, 4, 8, *r), lambda *r: ShuffledBatches(mixture, 4, 8, 5, *r)):
        alone = torch.cat([b.inputs for b in take(make(), 3)])
        shared = [take(make(rank, 2), 3) for rank in range(2)]
        together = torch.cat([torch.cat([shared[rank][i].inputs for rank in range(2)]) for i in range(3)])
        assert torch.equal(alone, together)


def test_unusable_mixtures_are_refused():
    sequence = in_memory(documents(5), seed=0)
    with pytest.raises(ValueError, match="has 6 tokens; length 6 needs at least 7"):
        SequentialBatches(Mixture([sequence]), 1, 6)
    with pytest.raises(ValueError, match="must be 1 positive numbers"):
        Mixture([sequence], [0.0])
    with pytest.raises(ValueError, match="no tokens"):
        in_memory([], 0)


def test_packed_documents_train_as_one_by_one():
    """Gradients of a packed row are those of its documents, each alone, weighted by their tokens."""
    torch.manual_seed(0)
    model = Megalodon(ModelConfig.named("tiny")).double()
    lengths = (20, 33, 9)
    mixture = Mixture([in_memory(documents(*lengths), seed=2)])
    batches = SequentialBatches(mixture, 1, sum(lengths) + 2)
    batch = batches.read(batches.begin())
    assert batch.starts is not None

    def loss(inputs, targets, starts=None):
        return model(inputs, targets=targets, document_starts=starts)[0] * inputs.numel()

    packed = torch.autograd.grad(loss(batch.inputs, batch.targets, batch.starts), list(model.parameters()))
    cuts = [*batch.starts[0].nonzero()[:, 0].tolist(), batch.inputs.shape[1]]
    parts = [slice(*pair) for pair in itertools.pairwise(cuts)]
    assert len(parts) == 3
    one_by_one = sum(loss(batch.inputs[:, p], batch.targets[:, p]) for p in parts)
    alone = torch.autograd.grad(one_by_one, list(model.parameters()))
    for a, e in zip(packed, alone, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("length", [8, 13])
@pytest.mark.parametrize("parts", [1, 5])
def test_a_row_enters_every_source_of_a_mixture_at_a_marked_start(length, parts):
    """Also where that is in mid-document, and where a step ends just before it: whose tokens change, the state does."""
    sources = [[np.array([BEGIN, *[i] * (195 // parts - 1)])] * parts for i in range(2)]
    stream = SequentialBatches(Mixture([in_memory(documents, seed=0) for documents in sources]), 3, length)
    batches = take(stream, 30)
    for row in range(3):
        tokens = torch.cat([b.inputs[row] for b in batches]).tolist()
        starts = torch.cat([torch.zeros(length).bool() if b.starts is None else b.starts[row] for b in batches])
        changes = [at for at in range(1, len(tokens)) if {tokens[at - 1], tokens[at]} == {0, 1}]
        assert bool(changes) == (parts == 1 and row > 0), "rows after the first enter a long document in its midst"
        assert all(starts[at] for at in changes)
        assert all(starts[at] for at, token in enumerate(tokens) if token == BEGIN)
        marked_inside = sum(bool(starts[at]) for at in range(len(tokens)) if tokens[at] != BEGIN)
        assert marked_inside <= 2, "once for each source"


@pytest.mark.parametrize("section", [1, 3, 4, 7, 100])
def test_sections_hold_every_token_once_and_begin_with_a_mark(section):
    documents = [np.arange(10), np.arange(100, 107), np.arange(200, 201)]
    sequence = in_memory(documents, seed=3, section=section)
    stretch = sequence.read(0, len(sequence))
    assert sorted(stretch.tokens.tolist()) == sorted(np.concatenate(documents).tolist())
    parts = np.split(stretch.tokens, np.flatnonzero(stretch.starts)[1:])
    expected = [d[at : at + section].tolist() for d in documents for at in range(0, len(d), section)]
    assert sorted(p.tolist() for p in parts) == sorted(expected)
    torn = ~stretch.learnt  # the first token of a section that is not the first: nothing before it tells of it
    assert sorted(stretch.tokens[torn].tolist()) == sorted(
        d[at] for d in documents for at in range(section, len(d), section)
    )
    assert sequence.fingerprint != in_memory(documents, seed=3).fingerprint
