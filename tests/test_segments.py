"""Gradients through a document, segment by segment, are those of one pass over it."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.architectures import build, config_of
from megalodon_lm.data.batches import Batch
from megalodon_lm.errors import InputError
from megalodon_lm.training.passes import Forward, OnePass
from megalodon_lm.training.segments import SegmentedPass
from megalodon_lm.training.trainer import Trainer

from .runs import recipe, same_weights
from .test_architectures import BYTES, EVERY, close, made, values

CPU = torch.device("cpu")
CHUNK = 12


def random_batch(seed, rows, length, packed=True, padded=True, masked=True):
    g = torch.Generator().manual_seed(seed)

    def some(part):
        return torch.rand(rows, length, generator=g) < part

    tokens = torch.randint(0, BYTES, (rows, length + 1), generator=g)
    return Batch(
        tokens[:, :-1], tokens[:, 1:], some(0.1) if packed else None, some(0.6) if masked else None, None,
        some(0.8) if padded else None,
    )  # fmt: skip


def part(batch, begin, end):
    return Batch(*(t[:, begin:end] if isinstance(t, torch.Tensor) else t for t in batch))


@st.composite
def cases(draw):
    """A batch, the places where it is cut, and a State before it or None."""
    rows, length = draw(st.integers(1, 2)), draw(st.integers(1, 3 * CHUNK))
    batch = random_batch(draw(st.integers(0, 2**31)), rows, length, *(draw(st.booleans()) for _ in range(3)))
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=5))) if length > 1 else []
    return batch, cuts, draw(st.sampled_from([None, 5, CHUNK, 2 * CHUNK + 5]))


def gradients(model, run):
    """Of all parameters, with what `run` gave."""
    model.zero_grad(set_to_none=True)
    passed = run(Forward(model, "float32", CPU))
    found = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return passed, found


def entry(model, batch, read):
    if read is None:
        return None
    before = random_batch(read, len(batch.inputs), read)
    with torch.no_grad():
        return model(before.inputs, document_starts=before.starts)[1]


def check(model, batch, cuts, read, tolerance=1e-10):
    state = entry(model, batch, read)
    segments = [part(batch, a, b) for a, b in pairwise([0, *cuts, batch.inputs.shape[1]])]
    learnt = batch.num_learnt + 7
    whole, expected = gradients(model, lambda forward: OnePass(forward)(batch, state, learnt))
    passed, found = gradients(model, lambda forward: SegmentedPass(forward, 1).through(segments, state, learnt))
    assert passed.loss == pytest.approx(whole.loss, rel=1e-10)
    close(passed.state, whole.state)
    assert not any(t.requires_grad for t in passed.state.tensors().values())
    for name, gradient in expected.items():
        scale = gradient.abs().max().clamp(min=1)
        assert (found[name] - gradient).abs().max() <= tolerance * scale, name


@pytest.mark.parametrize("name", ["megalodon", "gecko"])
@settings(max_examples=12, deadline=None)
@given(case=cases())
def test_segments_of_any_lengths_give_the_gradients_of_one_pass(name, case):
    check(made(name), *case)


@pytest.mark.parametrize("name", EVERY)
def test_every_architecture_hands_gradients_back(name):
    check(made(name), random_batch(1, 2, 40), [13, 24, 25], 7)


def test_gradients_reach_from_the_last_segment_to_the_first_within_a_document_alone():
    """A loss at the last token moves what only the first segment read, and nothing that another document read."""
    model = made("megalodon")
    tokens = torch.arange(37)[None] + 5
    learnt = torch.zeros(1, 36, dtype=torch.bool)
    learnt[0, -1] = True
    starts = torch.zeros(1, 36, dtype=torch.bool)
    for packed in (False, True):
        starts[0, 20] = packed
        batch = Batch(tokens[:, :-1], tokens[:, 1:], starts.clone(), learnt, None)
        _, found = gradients(model, lambda forward, batch=batch: SegmentedPass(forward, 8)(batch, None, 1))
        reached = found["embed.weight"][5:41].abs().amax(1)
        assert (reached[:20] == 0).all() if packed else (reached[:36] > 0).all()
        assert (reached[20:36] > 0).all()


@pytest.mark.parametrize("changes", [{}, {"activation_checkpointing": True}])
def test_dropout_is_drawn_again_as_it_was(changes):
    """Against one graph through the same segments; random numbers end where they would without a second reading."""
    torch.manual_seed(0)
    model = build(config_of(values("megalodon", dropout=0.3, hidden_dropout=0.2, attention_dropout=0.2)), **changes)
    model = model.double().train()
    batch = random_batch(3, 2, 40, padded=False)
    segments = [part(batch, a, b) for a, b in pairwise([0, 10, 24, 40])]

    def one_graph(forward):
        state, loss = None, 0.0
        for segment in segments:
            mean, state = forward.loss(segment, state)
            loss = loss + mean * segment.num_learnt / batch.num_learnt
        loss.backward()

    found = []
    for run in (one_graph, lambda forward: SegmentedPass(forward, 1).through(segments, None, batch.num_learnt)):
        torch.manual_seed(1)
        found.append((gradients(model, run)[1], torch.get_rng_state()))
    (expected, numbers), (actual, after) = found
    assert torch.equal(numbers, after)
    for name, gradient in expected.items():
        torch.testing.assert_close(actual[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_native_operators_and_mixed_precision(precision):
    model = made("megalodon", torch.float32)
    batch = random_batch(3, 2, 60)
    forward, found = Forward(model, precision, CPU), []
    for run in (OnePass(forward), SegmentedPass(forward, 24)):
        found.append(gradients(model, lambda _, run=run: run(batch, None, batch.num_learnt))[1])
    for name, gradient in found[0].items():
        near = 1e-4 if precision == "float32" else 0.05
        assert (found[1][name] - gradient).norm() <= near * gradient.norm() + 1e-6, name


def test_one_segment_is_one_pass_bit_for_bit():
    model, batch = made("megalodon", torch.float32), random_batch(5, 2, 30)
    state = entry(model, batch, 5)
    _, expected = gradients(model, lambda forward: OnePass(forward)(batch, state, 9))
    _, found = gradients(model, lambda forward: SegmentedPass(forward, 30)(batch, state, 9))
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_a_run_in_segments_follows_one_in_one_pass_and_goes_on_bit_for_bit(tmp_path):
    def trained(name, **training):
        trainer = Trainer(recipe(tmp_path, {"dropout": 0.0}, accumulate=2, **training), tmp_path / name)
        losses = []
        trainer.train(lambda m: losses.append(m.bits_per_token))
        return losses

    whole, cut = trained("whole", steps=6), trained("cut", steps=6, segment=20)
    assert cut == pytest.approx(whole, abs=1e-5)
    assert cut != whole
    dropped = recipe(tmp_path, segment=20, steps=8)
    Trainer(dropped, tmp_path / "straight").train()
    stopped = Trainer(dropped, tmp_path / "stopped")

    class Stop(Exception):
        pass

    def stop(metrics):
        if metrics.step == 6:
            raise Stop

    with pytest.raises(Stop):
        stopped.train(stop)
    assert Trainer(dropped, tmp_path / "stopped", resume="last").step == 4
    Trainer(dropped, tmp_path / "stopped", resume="last").train()
    assert same_weights(tmp_path / "straight", tmp_path / "stopped")


def test_a_negative_segment_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"training\.segment = -1 must not be negative"):
        recipe(tmp_path, segment=-1)
