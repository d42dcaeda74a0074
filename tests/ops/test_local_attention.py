"""Attention to the last tokens of a document: both implementations against the definition, and what holds of both."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from megalodon_lm.ops import local_attention as portable
from megalodon_lm.ops import reference
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cpu import batched_attention, causal_attention, squares, tiled_attention
from megalodon_lm.ops.cpu.local_attention import local_attention as native
from megalodon_lm.ops.local_attention import LocalCache
from megalodon_lm.ops.local_attention import local_attention as op

from .cases import BOUNDARIES, boundaries, gradients, sampled
from .test_sliding_properties import FAST, Largest, mark, pieces

B, H, W, BASE = 3, 2, 8, 1e4
POSITIONS = [(0, 0, 0), (5, 5, 5), (31, 31, 31), (3, 31, 7)]
LENGTHS = [1, 7, 8, 50]
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 3e-2}
IMPLEMENTATIONS = [(op.portable, torch.float64), (native, torch.float32)]


def case(length, dtype, width=4, window=W, batch=B):
    """Normal; in bf16 so that scores are as large at every width."""
    g = torch.Generator().manual_seed(0)
    shapes = [(batch, length, H, width)] * 3 + [(batch, window, H, width)] * 2
    narrow = [(4 / width) ** 0.25, (4 / width) ** 0.25, (4 / width) ** 0.5, (4 / width) ** 0.25, (4 / width) ** 0.5]
    scales = narrow if dtype == torch.bfloat16 else [1] * 5
    drawn = [torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    return [(t * scale).to(dtype) for t, scale in zip(drawn, scales, strict=True)]


def run(attention, where, position, window=W, base=BASE):
    position = torch.tensor(position)
    fill = position.clamp(max=window - 1)

    def call(q, k, v, keys, values):
        used = (torch.arange(window) < fill[:, None])[..., None, None]
        cache = LocalCache(torch.where(used, keys, 0), torch.where(used, values, 0), fill, position)
        out, leaving = attention(q, k, v, window, base, cache, where)
        call.where = leaving.fill.tolist(), leaving.position.tolist()
        return out, leaving.keys, leaving.values

    return call


def compare(attention, where, position, inputs, window=W, slow=reference.local_attention, base=BASE):
    fast, slow = run(attention, where, position, window, base), run(slow, where, position, window, base)
    actual, expected = gradients(fast, inputs), gradients(slow, [t.double() for t in inputs])
    of_piece = gradients(fast, inputs, asked=3)[1]  # a cache that is carried on as it is
    pairs = [*zip(actual[0] + actual[1], expected[0] + expected[1], strict=True)]
    pairs += zip(of_piece, expected[1][:3], strict=True)
    for i, (a, e) in enumerate(pairs):
        assert ((a - e).abs().max() / e.abs().max().clamp(min=1)).item() <= TOLERANCE[inputs[0].dtype], i
    assert fast.where == slow.where


@pytest.mark.parametrize(("kind", "position", "length"), sampled(BOUNDARIES, POSITIONS, LENGTHS))
def test_portable_equals_reference_with_all_gradients(kind, position, length, monkeypatch):
    monkeypatch.setattr(portable, "TILE_SIZE", 5)
    compare(op.portable, boundaries(kind, B, length), position, case(length, torch.float64))


@pytest.mark.parametrize(
    ("kind", "position", "length", "dtype", "sizes", "width", "in_squares"),
    sampled(BOUNDARIES, POSITIONS, LENGTHS, [torch.float32, torch.bfloat16], [(0, 5), (4, 20)], [4, 32], [True, False]),
)
def test_native_equals_reference_with_all_gradients(
    kind, position, length, dtype, sizes, width, in_squares, monkeypatch
):
    """In squares, where the processor has any, and by PyTorch's products, in tiles of 8 (of float32, 4) by 8 tokens."""
    if not in_squares:
        monkeypatch.setattr(squares, "available", lambda dtype: None)
    monkeypatch.setattr(tiled_attention, "TILE_SIZE", 8)
    monkeypatch.setattr(batched_attention, "TOGETHER", 60)
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", sizes[0])
    monkeypatch.setattr(causal_attention, "MERGED_KEYS", sizes[1])
    compare(native, boundaries(kind, B, length), position, case(length, dtype, width))


def test_gradients_of_the_only_score_are_nothing(monkeypatch):
    """By bf16 products of short groups, too, which round the gradients of weights: dq was 0.02 of the largest."""
    monkeypatch.setattr(squares, "available", lambda dtype: None)
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", 0)
    q, *_ = gradients(run(native, None, (0, 0, 0)), case(1, torch.bfloat16))[1]
    assert not q.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", BOUNDARIES)
def test_windows_of_several_tiles_equal_the_portable_path(kind, dtype):
    inputs = case(1000, dtype, 18, 300)
    compare(native, boundaries(kind, B, 1000), (17, 1299, 0), inputs, 300, op.portable)


@pytest.mark.parametrize(("attention", "dtype"), IMPLEMENTATIONS)
@pytest.mark.parametrize("length", [W, W + 1, 20])
def test_without_cache(attention, dtype, length):
    inputs = case(length, dtype)[:3]
    out, leaving = attention(*inputs, W, BASE)
    expected, entry = reference.local_attention(*(t.double() for t in inputs), W, BASE)
    for a, e in zip((out, *leaving), (expected, *entry), strict=True):
        torch.testing.assert_close(a.to(e.dtype), e, rtol=1e-4, atol=1e-5)
    assert op.implementation(*inputs, W, BASE) is attention


@pytest.mark.parametrize(("attention", "dtype"), IMPLEMENTATIONS)
def test_frequencies_of_another_rule(attention, dtype):
    compare(attention, boundaries("both", B, 20), (3, 31, 0), case(20, dtype), base=(0.7, 0.01))


@pytest.mark.parametrize(("attention", "dtype"), IMPLEMENTATIONS)
def test_a_window_of_two_tokens(attention, dtype):
    compare(attention, boundaries("both", B, 20), (3, 1, 0), case(20, dtype, window=2), 2)


def read(attention, inputs, window, starts, cuts=()):
    """Output and cache after reading in pieces, and gradients of a projection of both."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    marked, cache, outs = mark(starts, inputs[0].shape[1]), None, []
    for a, b in pairwise([0, *cuts, inputs[0].shape[1]]):
        where = Boundaries(marked[:, a:b]) if starts else None
        out, cache = attention(*(t[:, a:b] for t in inputs), window, BASE, cache, where)
        outs.append(out)
    made = [torch.cat(outs, 1), cache.keys, cache.values]
    g = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64)).sum() for t in made)
    return [*made, *torch.autograd.grad(loss, inputs)], (int(cache.fill), int(cache.position))


def drawn(case, dtype):
    (q, k, v), window, starts = case
    return [t.to(dtype) for t in (q, k, v[..., :4])], window + 1, starts


@pytest.mark.parametrize(("attention", "dtype"), IMPLEMENTATIONS)
@FAST
@given(case=pieces(), data=st.data())
def test_cut_anywhere(attention, dtype, case, data):
    """A sequence may be cut anywhere and the result is the same: outputs, cache and gradients."""
    inputs, window, starts = drawn(case, dtype)
    length = inputs[0].shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    found, expected = (read(attention, inputs, window, starts, c) for c in (cuts, ()))
    assert found[1] == expected[1]
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=30 * TOLERANCE[dtype], atol=30 * TOLERANCE[dtype])


@pytest.mark.parametrize(("attention", "dtype"), IMPLEMENTATIONS)
@FAST
@given(case=pieces(), padding=st.integers(0, 9))
def test_packed_equals_separate_and_padded_equals_unpadded(attention, dtype, case, padding):
    inputs, window, starts = drawn(case, dtype)
    length = inputs[0].shape[1]
    padded = [torch.cat([t, torch.full_like(t[:, :1], 7).expand(-1, padding, -1, -1)], 1) for t in inputs]
    where = Boundaries(mark(starts, length + padding), torch.tensor([length]))
    out, cache = attention(*padded, window, BASE, None, where)
    assert not out[:, length:].any()
    close = dict(rtol=10 * TOLERANCE[dtype], atol=10 * TOLERANCE[dtype])
    for a, b in pairwise([0, *starts, length]):
        alone, last = attention(*(t[:, a:b] for t in inputs), window, BASE)
        torch.testing.assert_close(out[:, a:b], alone, **close)
    for a, b in zip(cache, last, strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize(("attention", "dtype"), IMPLEMENTATIONS)
def test_a_token_sees_a_window_of_its_document_and_nothing_else(attention, dtype, few, monkeypatch):
    """Gradients are zero, exactly, elsewhere."""
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", few)
    length, window, starts = 23, 5, [0, 3, 14]
    inputs = [t.requires_grad_() for t in case(length, dtype, batch=1)[:3]]
    out, _ = attention(*inputs, window, BASE, None, Boundaries(mark(starts, length)))
    for t in range(length):
        first = max(max(s for s in starts if s <= t), t - window + 1)
        seen = [first <= u <= t for u in range(length)]
        _, key, value = torch.autograd.grad(out[0, t].square().sum(), inputs, retain_graph=True)
        assert (value[0] != 0).flatten(1).any(1).tolist() == seen
        if first < t:  # the score of a lone key changes nothing
            assert (key[0] != 0).flatten(1).any(1).tolist() == seen


@pytest.mark.parametrize("packed", [False, True])
def test_cost_grows_as_the_length_does(packed):
    """Operations and the largest tensor of the portable path; pairs that are multiplied in the native one."""
    window, found = 64, []
    for length in (1024, 4096):
        inputs = [t.requires_grad_() for t in case(length, torch.float32, batch=1)[:3]]
        where = Boundaries(mark(range(0, length, 150), length)) if packed else None
        with FlopCounterMode(display=False) as operations, Largest() as largest:
            op.portable(*inputs, window, BASE, None, where)[0].sum().backward()
        slots = (where or Boundaries()).since_start(torch.zeros(1, dtype=torch.int64), length).clamp(max=window - 1)
        _, groups = causal_attention._plan(slots)
        queries = groups[:, 2] - groups[:, 1]
        found.append((operations.get_total_flops(), largest.elements, (queries * (queries + groups[:, 3])).sum()))
        assert len(groups) <= length / 60
    assert all(many <= 5 * few for few, many in zip(*found, strict=True))
    assert found[1][2] <= 4096 * (window + causal_attention.MERGED_KEYS)


def test_positions_of_millions_turn_as_those_of_none():
    """Scores depend on differences of positions alone, to float32, wherever the piece stands."""
    q, k, v = case(20, torch.float32)[:3]
    empty = torch.zeros(B, 32, H, 4)
    starts = [torch.full((B,), position) for position in (0, 50_000_017)]
    outs = [op(q, k, v, 32, BASE, LocalCache(empty, empty, torch.zeros_like(p), p))[0] for p in starts]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-4, atol=1e-5)


def test_operator_is_well_formed():
    q, k, v, keys, values = (t.requires_grad_() for t in case(20, torch.float32))
    slots = (torch.tensor([[5], [29], [7]]) + torch.arange(20)).clamp(max=W - 1)
    torch.library.opcheck(causal_attention.attention_forward, (q, k, v, keys, values, slots))


@pytest.mark.parametrize("attention", [native, op.portable])
def test_compiles_as_one_graph(attention):
    where, position, fill = boundaries("both", B, 20), torch.tensor([3, 29, 8]), torch.tensor([3, 7, 7])

    def loss(q, k, v, keys, values, fill, position, where):
        out, leaving = attention(q, k, v, W, 1e4, LocalCache(keys, values, fill, position), where)
        return out.square().sum() + leaving.keys.square().sum() + leaving.values.square().sum()

    inputs = [t.requires_grad_() for t in case(20, torch.float32)]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(loss(*inputs, fill, position, where), inputs)
    for a, b in zip(torch.autograd.grad(compiled(*inputs, fill, position, where), inputs), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
