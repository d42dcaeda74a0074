"""What holds for attention over chunks whatever the sizes: cuts, packing, padding, what is seen, cost."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.cpu import causal_attention
from megalodon_lm.ops.cpu.sliding_attention import sliding_attention as native
from megalodon_lm.ops.sliding_attention import sliding_attention as op

FAST = settings(max_examples=20, deadline=None)
IMPLEMENTATIONS = [(op.portable, torch.float64, 1e-12), (native, torch.float32, 1e-5)]
BASE, H = 1e4, 2


@st.composite
def pieces(draw, most=40):
    """Inputs of one row, the size of a chunk, and places where documents begin."""
    length = draw(st.integers(2, most))
    seed, size = draw(st.integers(0, 99)), draw(st.integers(1, 9))
    starts = draw(st.sets(st.integers(1, length - 1), max_size=3))
    g = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(1, length, H, d, generator=g, dtype=torch.float64) for d in (4, 4, 6)]
    return inputs, size, sorted(starts)


def mark(starts, length):
    marked = torch.zeros(1, length, dtype=torch.bool)
    marked[0, list(starts)] = True
    return marked


def run(attention, inputs, size, starts, cuts=()):
    """Output and cache after reading in pieces, and gradients of a projection of both."""
    inputs = [t.detach().requires_grad_() for t in inputs]
    marked, cache, outs = mark(starts, inputs[0].shape[1]), None, []
    edges = [0, *cuts, inputs[0].shape[1]]
    for a, b in pairwise(edges):
        where = Boundaries(marked[:, a:b]) if starts else None
        out, cache = attention(*(t[:, a:b] for t in inputs), size, BASE, cache, where)
        outs.append(out)
    made = [torch.cat(outs, 1), cache.keys, cache.values]
    g = torch.Generator().manual_seed(1)
    loss = sum((t * torch.randn(t.shape, generator=g, dtype=torch.float64)).sum() for t in made)
    return [*made, *torch.autograd.grad(loss, inputs)], (int(cache.fill), int(cache.position))


@pytest.mark.parametrize(("attention", "dtype", "tolerance"), IMPLEMENTATIONS)
@FAST
@given(case=pieces(), data=st.data())
def test_cut_anywhere(attention, dtype, tolerance, case, data):
    """A sequence may be cut anywhere and the result is the same: outputs, cache and gradients."""
    inputs, size, starts = case
    length = inputs[0].shape[1]
    cuts = sorted(data.draw(st.sets(st.integers(1, length - 1), max_size=5)))
    inputs = [t.to(dtype) for t in inputs]
    found, expected = run(attention, inputs, size, starts, cuts), run(attention, inputs, size, starts)
    assert found[1] == expected[1]
    for a, b in zip(found[0], expected[0], strict=True):
        torch.testing.assert_close(a, b, rtol=30 * tolerance, atol=30 * tolerance)


@pytest.mark.parametrize(("attention", "dtype", "tolerance"), IMPLEMENTATIONS)
@FAST
@given(case=pieces(), padding=st.integers(0, 9))
def test_packed_equals_separate_and_padded_equals_unpadded(attention, dtype, tolerance, case, padding):
    inputs, size, starts = case
    inputs = [t.to(dtype) for t in inputs]
    length = inputs[0].shape[1]
    padded = [torch.cat([t, torch.full_like(t[:, :1], 7).expand(-1, padding, -1, -1)], 1) for t in inputs]
    where = Boundaries(mark(starts, length + padding), torch.tensor([length]))
    out, cache = attention(*padded, size, BASE, None, where)
    assert not out[:, length:].any()
    edges = [0, *starts, length]
    for a, b in pairwise(edges):
        alone, last = attention(*(t[:, a:b] for t in inputs), size, BASE)
        torch.testing.assert_close(out[:, a:b], alone, rtol=10 * tolerance, atol=10 * tolerance)
    for a, b in zip(cache, last, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("few", [0, 8])
@pytest.mark.parametrize(("attention", "dtype", "tolerance"), IMPLEMENTATIONS)
def test_a_token_sees_its_chunk_and_the_one_before_and_nothing_else(attention, dtype, tolerance, few, monkeypatch):
    """Gradients are zero, exactly, elsewhere."""
    monkeypatch.setattr(causal_attention, "FEW_QUERIES", few)
    length, size, starts = 23, 4, [0, 3, 14]
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, length, H, d, generator=g, dtype=dtype).requires_grad_() for d in (4, 4, 6)]
    out, _ = attention(*inputs, size, BASE, None, Boundaries(mark(starts, length)))
    for t in range(length):
        start = max(s for s in starts if s <= t)
        first = max(start, start + (t - start) // size * size - size)
        seen = [first <= u <= t for u in range(length)]
        _, key, value = torch.autograd.grad(out[0, t].square().sum(), inputs, retain_graph=True)
        assert (value[0] != 0).flatten(1).any(1).tolist() == seen
        if first < t:  # the score of a lone key changes nothing
            assert (key[0] != 0).flatten(1).any(1).tolist() == seen


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if isinstance(made, torch.Tensor):
            self.elements = max(self.elements, made.numel())
        return made


def cost(length, size, packed):
    """Operations of matrix products, forward and backward, and the largest tensor."""
    g = torch.Generator().manual_seed(0)
    inputs = [torch.randn(1, length, 1, 4, generator=g).requires_grad_() for _ in range(3)]
    where = Boundaries(mark(range(0, length, 5 * size // 2), length)) if packed else None
    with FlopCounterMode(display=False) as operations, Largest() as largest:
        op.portable(*inputs, size, BASE, None, where)[0].sum().backward()
    return operations.get_total_flops(), largest.elements


@pytest.mark.parametrize("packed", [False, True])
def test_cost_grows_as_the_length_does(packed):
    size = 32
    (few, small), (many, large) = (cost(length, size, packed) for length in (512, 2048))
    assert many <= 5 * few
    assert large <= 5 * small
    assert large <= 4 * size * 2048


def test_documents_cost_what_one_does():
    """First chunks, which see none before them, share no bin that would make all others twice as wide."""

    def operations(starts):
        inputs = [torch.zeros(1, 2048, 1, 4) for _ in range(3)]
        with FlopCounterMode(display=False) as counted:
            op.portable(*inputs, 256, BASE, None, Boundaries(mark(starts, 2048)) if starts else None)
        return counted.get_total_flops()

    assert operations([500, 756, 1012, 1268]) <= 1.3 * operations([])
