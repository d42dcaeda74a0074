"""Rotary positions: only differences matter, however far a document has come."""

import pytest
import torch

from megalodon_lm.ops import reference
from megalodon_lm.ops.chunk_attention import chunk_attention
from megalodon_lm.ops.cpu import rotary as native
from megalodon_lm.ops.cpu.chunk_attention import chunk_attention as native_chunk_attention
from megalodon_lm.ops.cpu.sliding_attention import sliding_attention as native_sliding_attention
from megalodon_lm.ops.rotary import document_turns, rope
from megalodon_lm.ops.sliding_attention import SlidingCache, sliding_attention

from .cases import boundaries
from .test_cpu_chunk_attention import TOLERANCE

BASE, C, D = 5e5, 16, 64
FAR = [0, 99_999, 4_000_000, 10_000_003, 2**40 + 5]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def turned(x, positions, heads_without_rope, natively):
    if natively:
        return native.rotate(x, positions, BASE, C, heads_without_rope)
    return rope(x, document_turns(x, positions, BASE, C), heads_without_rope)


@pytest.mark.parametrize("heads_without_rope", [0, 1, 3])
@pytest.mark.parametrize(
    ("natively", "dtype", "tolerance"),
    [(False, torch.float64, 1e-9), (False, torch.float32, 1e-6), (True, torch.float32, 1e-6)]
    + [(natively, torch.bfloat16, 2e-2) for natively in (False, True)],
)
def test_turns_by_positions_in_the_document(natively, dtype, tolerance, heads_without_rope):
    """Of ten million and more, where an angle in float32 would be anything."""
    x, positions = draw(len(FAR[:4]), 20, 3, D, dtype=dtype), torch.tensor(FAR[:4])[:, None] + torch.arange(20)
    rows = [
        torch.stack(
            [reference.rope(x[b, t].double(), int(positions[b, t]), BASE, heads_without_rope) for t in range(20)]
        )
        for b in range(len(x))
    ]
    found = turned(x, positions, heads_without_rope, natively)
    torch.testing.assert_close(found.double(), torch.stack(rows), rtol=0, atol=4 * tolerance)
    if heads_without_rope:
        assert torch.equal(found[:, :, -heads_without_rope:], x[:, :, -heads_without_rope:])


@pytest.mark.parametrize("far", FAR[1:4])
@pytest.mark.parametrize("attention", [sliding_attention.portable, native_sliding_attention])
def test_scores_depend_on_differences_of_positions_alone(attention, far):
    """A document goes on as from its start, once its first chunks are out of sight; scores are up to 9."""
    start = far // C * C
    q, k, v = (draw(1, 4 * C, 2, D, seed=i) for i in range(3))
    q, k = (3 * t / t.norm(dim=-1, keepdim=True) for t in (q, k))
    near, _ = attention(q, k, v, C, BASE)
    keys, values = (torch.zeros(1, 2 * C, 2, D) for _ in range(2))
    cache = SlidingCache(keys, values, torch.tensor([C]), torch.tensor([start]))
    distant, leaving = attention(q, k, v, C, BASE, cache)
    torch.testing.assert_close(distant[:, 2 * C :], near[:, 2 * C :], rtol=0, atol=1e-5)
    assert int(leaving.position) == start + 4 * C
    assert (distant[:, :C] - near[:, :C]).abs().max() > 0.1  # which see a chunk before


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize(
    ("attention", "dtype", "tolerance"),
    [(chunk_attention.portable, torch.float64, 1e-9), (native_chunk_attention, torch.float32, 1e-5)],
)
def test_positions_that_restart_in_each_chunk_equal_those_in_the_document(attention, dtype, tolerance, kind):
    """So there is no choice between them."""
    where = boundaries(kind, 3, 50)
    q, k, v = (draw(3, 50, 2, D, dtype=dtype, seed=i) / 4 for i in range(3))
    restarting, _ = attention(q, k, v, C, BASE, None, where)
    far = torch.tensor(FAR[1:4])[:, None] // C * C
    positions = far + (torch.arange(50).expand(3, -1) if where is None else where.since_start(far[:, 0] * 0, 50))
    turns = document_turns(q, positions, BASE, C)
    absolute, _ = attention(rope(q, turns), rope(k, turns), v, C, BASE, None, where, heads_without_rope=2)
    torch.testing.assert_close(absolute, restarting, rtol=0, atol=tolerance)
    unturned, _ = attention(q, k, v, C, BASE, None, where, heads_without_rope=2)
    assert (unturned - restarting).abs().max() > 1e-2


@pytest.mark.parametrize("natively", [False, True])
@pytest.mark.parametrize("heads_without_rope", [1, 2])
def test_chunk_attention_leaves_heads_without_positions(heads_without_rope, natively):
    attention, dtype = (
        (native_chunk_attention, torch.float32) if natively else (chunk_attention.portable, torch.float64)
    )
    where = boundaries("both", 3, 40)
    inputs = [draw(3, 40, 2, 8, dtype=dtype, seed=i) for i in range(3)]
    found, cache = attention(*inputs, C, BASE, None, where, heads_without_rope=heads_without_rope)
    wide = [t.double() for t in inputs]
    expected, leaving = reference.chunk_attention(*wide, C, BASE, None, where, heads_without_rope)
    tolerance = TOLERANCE[dtype] if natively else 1e-12
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=10 * tolerance)
    torch.testing.assert_close(cache.keys.double(), leaving.keys, rtol=0, atol=10 * tolerance)
