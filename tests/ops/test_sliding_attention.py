"""Attention to a chunk and the one before it, against its definition."""

import pytest
import torch

from megalodon_lm.ops import attention, bins, reference, windowed_attention
from megalodon_lm.ops.boundaries import Boundaries
from megalodon_lm.ops.sliding_attention import SlidingCache
from megalodon_lm.ops.sliding_attention import sliding_attention as op

from .cases import BOUNDARIES, assert_close, boundaries, gradients, sampled

sliding_attention = op.portable

B, H, DK, DV, C = 3, 2, 4, 6, 8
POSITIONS = [(0, 0, 0), (5, 5, 5), (8, 8, 8), (21, 21, 21), (3, 31, 0), (16, 7, 24)]


def case(length, dtype=torch.float64, chunk_size=C, dk=DK, dv=DV, batch=B, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = [(batch, length, H, dk), (batch, length, H, dk), (batch, length, H, dv)]
    shapes += [(batch, 2 * chunk_size, H, dk), (batch, 2 * chunk_size, H, dv)]
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype) for s in shapes]


def run(op, where, position, chunk_size=C, **choices):
    position = torch.tensor(position)
    fill = torch.where(position < chunk_size, position, chunk_size + position % chunk_size)

    def call(q, k, v, keys, values):
        used = (torch.arange(2 * chunk_size) < fill[:, None])[..., None, None]
        cache = SlidingCache(torch.where(used, keys, 0), torch.where(used, values, 0), fill, position)
        out, leaving = op(q, k, v, chunk_size, 1e4, cache, where, **choices)
        call.where = leaving.fill.tolist(), leaving.position.tolist()
        return out, leaving.keys, leaving.values

    return call


def compare(where, position, length, **choices):
    fast, slow = (run(f, where, position, **choices) for f in (sliding_attention, reference.sliding_attention))
    actual, expected = gradients(fast, case(length)), gradients(slow, case(length))
    assert_close(actual[0], expected[0], 1e-12)
    assert_close(actual[1], expected[1], 1e-11)
    assert fast.where == slow.where


@pytest.mark.parametrize(("kind", "position", "length"), sampled(BOUNDARIES, POSITIONS, [1, 7, 16, 50]))
def test_equals_reference_with_all_gradients(kind, position, length, monkeypatch):
    monkeypatch.setattr(attention, "TILE_SIZE", 5)
    compare(boundaries(kind, B, length), position, length)


@pytest.mark.parametrize("kind", ["none", "both"])
@pytest.mark.parametrize("length", [4, 50])
@pytest.mark.parametrize("position", POSITIONS[-2:])
def test_layout_of_graphs_equals_reference_with_all_gradients(kind, length, position, monkeypatch):
    """What is taken where a graph lets no value decide a shape; here without one, in several tiles."""
    monkeypatch.setattr(attention, "TILE_SIZE", 5)
    monkeypatch.setattr(windowed_attention, "_in_bins", windowed_attention._in_graph)
    compare(boundaries(kind, B, length), position, length)


def test_chunks_of_one_token():
    q, k, v, _, _ = case(7)
    for where in (None, Boundaries(torch.arange(7).expand(B, 7) % 3 == 0)):
        actual = sliding_attention(q, k, v, 1, 1e4, None, where)
        assert_close([actual[0]], [reference.sliding_attention(q, k, v, 1, 1e4, None, where)[0]], 1e-12)


@pytest.mark.parametrize("merged", [1, 3, 100])
def test_documents_of_all_lengths_share_bins(merged, monkeypatch):
    monkeypatch.setattr(bins, "MERGED_KEYS", merged)
    starts = torch.zeros(B, 60, dtype=torch.bool)
    starts[:, torch.tensor([0, 1, 2, 5, 12, 13, 40])] = True
    starts[1, 0] = False
    compare(Boundaries(starts), (3, 31, 0), 60)


@pytest.mark.parametrize("heads_without_rope", [1, H])
@pytest.mark.parametrize("kind", ["none", "both"])
def test_heads_without_positions(heads_without_rope, kind):
    compare(boundaries(kind, B, 20), (3, 31, 0), 20, heads_without_rope=heads_without_rope)
