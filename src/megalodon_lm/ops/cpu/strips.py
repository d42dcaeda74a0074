"""How kernels of recurrences over channels cut their work: tasks of a row and CHANNELS channels, strips of TOKENS each.

A strip is converted to float32 scratch (TOKENS, CHANNELS), and states to (values, CHANNELS), so that innermost loops
find sixteen channels side by side. All arrays but those of the plan are flat.
"""

from typing import Any

import numpy as np
from torch import Tensor

from .simd import LANES, compiled, inner, load, store

CHANNELS = 2 * LANES
TOKENS = 64


def plan(batch: int, length: int, starts: Tensor | None, lengths: Tensor | None) -> tuple[np.ndarray, ...]:
    """edges, slots and counts of plan_strips."""
    most = -(-length // TOKENS) + (0 if starts is None else int(starts.sum(1).max()))
    edges = np.empty((batch, most + 1), np.int64)
    slots = np.empty((batch, most), np.int64)
    counts = np.empty(batch, np.int64)
    began = np.zeros((batch, 0), np.bool_) if starts is None else starts.contiguous().numpy()
    valid = np.full(batch, length) if lengths is None else lengths.contiguous().numpy()
    plan_strips(began, valid, edges, slots, counts)
    return edges, slots, counts


@compiled
def plan_strips(starts: Any, lengths: Any, edges: Any, slots: Any, counts: Any) -> None:
    """Cut each row at document starts and every TOKENS tokens.

    Args:
        starts: (B, L) bool, or (B, 0) for no document.
        lengths: (B,) int64.
        edges: (B, M + 1) int64, out: first token of each strip, and the end of the last.
        slots: (B, M) int64, out: -1 for a strip that starts a document; the others of a row are numbered from 0, and
            never more than there are TOKENS in the row, rounded up.
        counts: (B,) int64, out: strips of each row.
    """
    packed = starts.shape[1] > 0
    for b in range(len(lengths)):
        at, m, slot = 0, 0, 0
        while at < lengths[b]:
            edges[b, m] = at
            slots[b, m] = -1
            if not (packed and starts[b, at]):
                slots[b, m] = slot
                slot += 1
            end = min(at + TOKENS, lengths[b])
            if packed:
                for t in range(at + 1, end):
                    if starts[b, t]:
                        end = t
                        break
            at = end
            m += 1
        edges[b, m] = at
        counts[b] = m


@inner
def clear(array: Any, offset: int, size: int) -> None:
    """Zero a stretch. A loop, because NumPy's slices take seconds to compile."""
    for i in range(offset, offset + size):
        array[i] = 0


@inner
def gather(source: Any, offset: int, dim: int, size: int, width: int, strip: Any) -> None:
    """`size` tokens of `width` channels into float32 scratch; zero in missing channels."""
    if width == CHANNELS:
        for t in range(size):
            store(strip, t * CHANNELS, load(source, offset + t * dim))
            store(strip, t * CHANNELS + LANES, load(source, offset + t * dim + LANES))
        return
    some = np.zeros(CHANNELS, source.dtype)
    for t in range(size):
        for w in range(width):
            some[w] = source[offset + t * dim + w]
        store(strip, t * CHANNELS, load(some, 0))
        store(strip, t * CHANNELS + LANES, load(some, LANES))


@inner
def scatter(strip: Any, target: Any, offset: int, dim: int, size: int, width: int) -> None:
    """The inverse of gather."""
    if width == CHANNELS:
        for t in range(size):
            store(target, offset + t * dim, load(strip, t * CHANNELS))
            store(target, offset + t * dim + LANES, load(strip, t * CHANNELS + LANES))
        return
    some = np.empty(CHANNELS, target.dtype)
    for t in range(size):
        store(some, 0, load(strip, t * CHANNELS))
        store(some, LANES, load(strip, t * CHANNELS + LANES))
        for w in range(width):
            target[offset + t * dim + w] = some[w]


@inner
def enter(states: Any, source: Any, offset: int, values: int, width: int) -> None:
    """(width, values) of a state tensor into scratch; zero in missing channels, and beyond `values`."""
    clear(states, 0, len(states))
    for w in range(width):
        for i in range(values):
            states[i * CHANNELS + w] = source[offset + w * values + i]


@inner
def leave(states: Any, target: Any, offset: int, values: int, width: int) -> None:
    """The inverse of enter."""
    for w in range(width):
        for i in range(values):
            target[offset + w * values + i] = states[i * CHANNELS + w]
