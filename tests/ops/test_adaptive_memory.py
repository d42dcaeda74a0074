from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megalodon_lm.ops import reference
from megalodon_lm.ops.adaptive_memory import MemoryState, absorb, adaptive_memory
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cpu import adaptive_memory as cpu
from megalodon_lm.ops.windowed_attention import Window, enter, leave

from .cases import BOUNDARIES, assert_close, boundaries, gradients, sampled

fast = adaptive_memory.portable
B, H, DK, DV, C = 3, 2, 16, 32, 8


@pytest.fixture(autouse=True)
def _small_chunks_run_natively_too(monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_PRODUCTS", 0)


def native(*args):
    """The op, made sure that it runs natively."""
    assert adaptive_memory.implementation(*args) is not fast
    return adaptive_memory(*args)


BOTH = pytest.mark.parametrize("op", [fast, native], ids=["portable", "native"])


class Cache(NamedTuple):
    """Of attention: what is looked at."""

    values: torch.Tensor
    fill: torch.Tensor


def case(length, lag, seed=0, batch=B):
    """q, k, v, and of the entry: values of the cache, keys, memory, log_sum."""
    g = torch.Generator().manual_seed(seed)
    shapes = [(length, H, DK)] * 2 + [(length, H, DV), (2 * C, H, DV), (C, H, DK), (lag, H, DK, DV), (H, DK)]
    return [torch.randn(batch, *s, generator=g, dtype=torch.float64) for s in shapes]


def run(op, where, lag, fill, chunks, sliding=False):
    """The op as a function of all tensors with a gradient: (out, keys, memory, log_sum)."""

    def call(q, k, v, values, keys, memory, log_sum):
        used = (torch.arange(C) < fill[:, None])[..., None, None]
        before = (torch.arange(lag, 0, -1) <= chunks[:, None])[..., None, None, None]
        state = MemoryState(
            torch.where(used, keys, 0),
            fill,
            torch.where(before, memory, 0),
            torch.where((chunks > 0)[:, None, None], log_sum, 0),
            chunks,
        )
        cache = Cache(values, torch.where(chunks > 0, C + fill, fill)) if sliding else Cache(values[:, :C], fill)
        out, leaving = op(q, k, v, C, lag, state, cache, where)
        call.counts = leaving.fill, leaving.chunks
        return out, leaving.keys, leaving.memory, leaving.log_sum

    return call


def compare(where, lag, fill, chunks, length, sliding=False, seed=0):
    fill, chunks = torch.tensor(fill), torch.tensor(chunks)
    quick, slow = (run(op, where, lag, fill, chunks, sliding) for op in (fast, reference.adaptive_memory))
    inputs = case(length, lag, seed, len(fill))
    actual, expected = gradients(quick, inputs), gradients(slow, inputs)
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)
    for a, e in zip(quick.counts, slow.counts, strict=True):
        assert torch.equal(a, e)


FILLS, CHUNKS = [(0, 0, 0), (5, 5, 5), (3, 7, 0)], [(0, 0, 0), (1, 0, 5)]


@pytest.mark.parametrize(
    ("kind", "lag", "fill", "chunks", "length", "sliding"),
    sampled(BOUNDARIES, [1, 2], FILLS, CHUNKS, [1, 8, 50], [False, True]),
)
def test_equals_reference_with_all_gradients(kind, lag, fill, chunks, length, sliding):
    compare(boundaries(kind, B, length), lag, fill, chunks, length, sliding)


def compare_native(where, lag, fill, chunks, length, dtype, tolerance, sliding=False, seed=0):
    counts, inputs = (torch.tensor(fill), torch.tensor(chunks)), case(length, lag, seed, len(fill))
    inputs = [t.to(dtype) for t in inputs[:5]] + [inputs[5].float(), inputs[6]]
    found = gradients(run(native, where, lag, *counts, sliding), inputs)
    expected = gradients(run(reference.adaptive_memory, where, lag, *counts, sliding), [t.double() for t in inputs])
    assert_close(found[0] + found[1], expected[0] + expected[1], tolerance)


@pytest.mark.parametrize(
    ("dtype", "kind", "lag", "fill", "chunks", "length", "sliding"),
    sampled(["float32", "bfloat16"], BOUNDARIES, [1, 2], FILLS, CHUNKS, [1, 8, 50], [False, True]),
)
def test_native_equals_reference_with_all_gradients(dtype, kind, lag, fill, chunks, length, sliding):
    tolerance = {"float32": 1e-5, "bfloat16": 3e-2}[dtype]
    compare_native(boundaries(kind, B, length), lag, fill, chunks, length, getattr(torch, dtype), tolerance, sliding)


def test_gradcheck():
    inputs = [t.requires_grad_() for t in case(20, 2)]
    for fill in ([3, 7, 0], [4, 4, 4]):
        call = run(fast, None, 2, torch.tensor(fill), torch.tensor([1, 0, 5]), True)
        assert torch.autograd.gradcheck(call, inputs, fast_mode=True)


@st.composite
def pieces(draw):
    """Length, documents, paddings, and the entry's counts."""
    length = draw(st.integers(1, 40))
    starts = torch.tensor([draw(st.lists(st.integers(0, 12).map(lambda n: n == 0), min_size=length, max_size=length))])
    lengths = torch.tensor([draw(st.integers(0, length)), length])
    starts = torch.cat([starts, starts.roll(draw(st.integers(0, length)), 1)])
    where = Boundaries(draw(st.sampled_from([None, starts])), draw(st.sampled_from([None, lengths])))
    fill, chunks = ([draw(st.integers(0, most)), draw(st.integers(0, most))] for most in (C - 1, 3))
    return length, where, fill, chunks


@settings(max_examples=12, deadline=None)
@given(piece=pieces(), lag=st.integers(1, 3), sliding=st.booleans(), seed=st.integers(0, 99))
def test_random_documents_and_paddings_equal_reference(piece, lag, sliding, seed):
    length, where, fill, chunks = piece
    compare(where, lag, fill, chunks, length, sliding, seed)
    compare_native(where, lag, fill, chunks, length, torch.float32, 1e-5, sliding, seed)


def read_on(tokens, lag, cuts, starts=None, op=fast):
    """Outputs and exit state of tokens (q, k, v) read in pieces, each with the cache that attention would leave."""
    state, values, outs, window = None, None, [], Window(C)
    for begin, end in zip([0, *cuts], [*cuts, tokens[0].shape[1]], strict=True):
        q, k, v = (t[:, begin:end] for t in tokens)
        where = None if starts is None else Boundaries(starts[:, begin:end])
        fill = None if state is None else state.fill
        cache = None if values is None else Cache(values, fill)
        out, after = op(q, k, v, C, lag, state, cache, where)
        values = leave(v, values, window, enter(window, fill, where, len(q), end - begin))
        state = after
        outs.append(out)
    return [torch.cat(outs, 1), *state]


@settings(max_examples=8, deadline=None)
@given(cuts=st.sets(st.integers(1, 49)), lag=st.integers(1, 3), packed=st.booleans())
def test_cuts_make_no_difference(cuts, lag, packed):
    tokens = case(50, lag)[:3]
    starts = boundaries("documents", B, 50).starts if packed else None
    for op, tolerance, inputs in ((fast, 1e-12, tokens), (native, 2e-5, [t.float() for t in tokens])):
        whole, cut = (read_on(inputs, lag, c, starts, op) for c in ([], sorted(cuts)))
        for w, c in zip(whole, cut, strict=True):
            torch.testing.assert_close(c, w, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lag", [1, 2])
def test_one_token_at_a_time_equals_the_whole(lag):
    tokens = [t[:1] for t in case(35, lag)[:3]]
    for whole, steps in zip(read_on(tokens, lag, []), read_on(tokens, lag, range(1, 35)), strict=True):
        torch.testing.assert_close(steps, whole, atol=1e-12, rtol=1e-12)


def test_packed_equals_separate():
    lengths = [30, 1, C, 3 * C + 2, 25]
    tokens = [t[:1] for t in case(sum(lengths), 2)[:3]]
    starts = torch.cat([torch.arange(n)[None] == 0 for n in lengths], 1)
    packed, *state = read_on(tokens, 2, [], starts)
    alone = [read_on(part, 2, []) for part in zip(*(t.split(lengths, 1) for t in tokens), strict=True)]
    torch.testing.assert_close(packed, torch.cat([out for out, *_ in alone], 1), atol=1e-12, rtol=1e-12)
    for together, own in zip(state, alone[-1][1:], strict=True):
        torch.testing.assert_close(together, own, atol=1e-12, rtol=1e-12)


@BOTH
def test_nothing_leaks_between_documents_or_backwards(op):
    length, start = 60, 27
    inputs = [t.float().requires_grad_() for t in case(length, 1)]
    starts = torch.zeros(B, length, dtype=torch.bool)
    starts[:, start] = True
    call = run(op, Boundaries(starts), 1, torch.tensor([3, 7, 0]), torch.tensor([1, 0, 5]))
    out, _, memory, log_sum = call(*inputs)
    of_second = torch.autograd.grad((out[:, start:].sum(), memory.sum(), log_sum.sum()), inputs, retain_graph=True)
    assert all(not g[:, :start].any() for g in of_second[:3])
    assert all(g[:, start : start + C].any() for g in of_second[1:3])
    assert not any(g.any() for g in of_second[3:])
    of_first = torch.autograd.grad(out[:, :20].sum(), inputs)
    assert of_first[0][:, 8:20].any()
    assert all(not g[:, 20:].any() for g in of_first[:3])


@BOTH
def test_ten_million_tokens(op):
    """In float32, far on in a document: M still moves by what the definition says, log_sum does not wear."""
    length, chunks = 64 * C, 10_000_000 // C
    inputs = case(length, 1, batch=1)
    inputs[-1] += torch.tensor(chunks * C).log()
    counts = torch.tensor([0]), torch.tensor([chunks])
    exact, single = (run(f, None, 1, *counts) for f in (reference.adaptive_memory, op))
    expected = exact(*inputs)
    found = single(*(t.float() for t in inputs[:-1]), inputs[-1])
    moved = [memory - before for memory, before in ((expected[2], inputs[-2]), (found[2], inputs[-2].float()))]
    assert moved[0].abs().mean() > 1e-6
    torch.testing.assert_close(moved[1].double(), moved[0], atol=0.02 * float(moved[0].std()), rtol=0)
    torch.testing.assert_close(found[3] - inputs[-1], expected[3] - inputs[-1], atol=0, rtol=1e-6)


@BOTH
def test_a_row_frozen_by_a_huge_key_stays_finite(op):
    inputs = [t.float() for t in case(50, 1)]
    inputs[1][:, 9, :, 1] = 1e30
    call = run(op, None, 1, torch.tensor([0, 0, 0]), torch.tensor([1, 0, 5]))
    outputs, grads = gradients(call, inputs)
    assert all(torch.isfinite(t).all() for t in outputs + grads)
    soon = call(*(t[:, : 2 * C] for t in inputs[:3]), *inputs[3:])
    assert torch.equal(outputs[2][:, 0, :, 1], soon[2][:, 0, :, 1])  # for ever
    assert not torch.equal(outputs[2][:, 0, :, 2], soon[2][:, 0, :, 2])


@BOTH
def test_first_chunks_are_absorbed_as_they_are_with_finite_gradients(op):
    inputs = [t.float() for t in case(2 * C, 1)]
    outputs, grads = gradients(run(op, None, 1, torch.tensor([0, 0, 0]), torch.tensor([0, 0, 0])), inputs)
    assert all(torch.isfinite(t).all() for t in outputs + grads)
    kappa = inputs[1][:, :C].softmax(1)
    first = torch.einsum("bthk,bthv->bhkv", kappa, inputs[2][:, :C])
    read = torch.einsum("bthk,bhkv->bthv", inputs[0][:, C:].softmax(-1), first)
    torch.testing.assert_close(outputs[0][:, C:], read)


def test_bf16_keeps_its_sums_in_float32():
    inputs = case(50, 2)
    rounded = [t.bfloat16() for t in inputs[:5]] + [t.float() for t in inputs[5:]]
    call = run(fast, boundaries("documents", B, 50), 2, torch.tensor([3, 7, 0]), torch.tensor([1, 0, 5]))
    exact = gradients(call, [t.double() for t in rounded])
    found = gradients(call, rounded)
    assert [t.dtype for t in call(*rounded)] == [torch.bfloat16, torch.bfloat16, torch.float32, torch.float64]
    assert_close(found[0], exact[0], 2e-2)
    assert_close(found[1], exact[1], 2e-2)


@pytest.mark.parametrize("chunks", [[1, 0, 5], [0, 0, 0]])
def test_absorb_is_what_the_op_does_at_the_end_of_a_chunk(chunks):
    fill, chunks = torch.tensor([0, 0, 0]), torch.tensor(chunks)
    inputs = case(C, 1)
    _, _, memory, log_sum = run(fast, boundaries("none", B, C), 1, fill, chunks)(*inputs)
    _, keys, values, *_, before, old = inputs
    found = absorb(keys, values, before[:, 0], old, chunks)
    torch.testing.assert_close(found[0], memory[:, 0], atol=1e-12, rtol=0)
    torch.testing.assert_close(found[1], log_sum, atol=1e-12, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("kind", ["none", "both"])
@BOTH
def test_one_graph_equals_what_runs_without(op, kind, given):
    where, counts = boundaries(kind, B, 20), (torch.tensor([3, 7, 0]), torch.tensor([1, 0, 5]))

    def call(q, k, v, *entry):
        if given:
            return run(op, where, 2, *counts, True)(q, k, v, *entry)
        out, leaving = op(q, k, v, C, 2, None, None, where)
        return out, leaving.keys, leaving.memory, leaving.log_sum

    inputs = [t.float() for t in case(20, 2)]
    torch.compiler.reset()
    found = gradients(torch.compile(call, fullgraph=True, backend="aot_eager"), inputs)
    expected = gradients(call, inputs)
    torch.compiler.reset()
    assert_close(found[0] + found[1], expected[0] + expected[1], 1e-5)


@pytest.mark.slow
def test_operator_is_well_formed():
    q, k, v, values, keys, memory, log_sum = (t.float().requires_grad_() for t in case(20, 2))
    since = torch.arange(20) + torch.tensor([[3], [17], [40]])
    chunks = (since[:, -1] + 1) // C
    given = (k, v, keys, values[:, :C].detach().contiguous().requires_grad_(), memory, log_sum.detach().double())
    # Not against a graph, as above: parts of what is kept for backward are never written.
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(cpu.memory_forward, (q, *given, since, chunks, C), test_utils=checks)
