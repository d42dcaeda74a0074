from typing import NamedTuple

import pytest
import torch

from megalodon_lm.ops import reference
from megalodon_lm.ops.adaptive_memory import MemoryState, adaptive_memory

from .cases import BOUNDARIES, assert_close, boundaries, gradients, sampled

fast = adaptive_memory.portable
B, H, DK, DV, C = 3, 2, 4, 6, 8


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


@pytest.mark.parametrize(
    ("kind", "lag", "fill", "chunks", "length", "sliding"),
    sampled(BOUNDARIES, [1, 2], [(0, 0, 0), (5, 5, 5), (3, 7, 0)], [(0, 0, 0), (1, 0, 5)], [1, 8, 50], [False, True]),
)
def test_equals_reference_with_all_gradients(kind, lag, fill, chunks, length, sliding):
    compare(boundaries(kind, B, length), lag, fill, chunks, length, sliding)
