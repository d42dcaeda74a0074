"""The adaptive memory for one new token a row: its key, and what it recalls; see decoding_kernels.

Whole chunks are absorbed outside, by the op's own function: that happens once in a chunk.
"""

from typing import Any

import numpy as np

from . import scalars
from .decoding_attention import head_scale
from .simd import LANES, add_product, exp, inner, load, splat, store, total

STRIP = 256  # values of one task


@inner
def enter_memory(
    first: int, last: int, z: Any, gamma: Any, beta: Any, positions: Any, shape: Any, eps: float, normalized: bool,
    q: Any, keys: Any,
) -> None:  # fmt: skip
    """Rows first..last: normalise z per head, make the query, whose softmax is taken, and store the key as it is."""
    size, heads, dk, _ = shape
    for b in range(first, last):
        entry = b * size + positions[b] % size
        for h in range(heads):
            at, to = (b * heads + h) * dk, (entry * heads + h) * dk
            scale = head_scale(z, at, dk, eps) if normalized else np.float32(1)
            highest = np.float32(-np.inf)
            for i in range(dk):
                w = h * dk + i
                normal = z[at + i] * scale
                q[at + i] = normal * gamma[w] + beta[w]
                highest = max(highest, q[at + i])
                w += heads * dk
                keys[to + i] = scalars.rounded(normal * gamma[w] + beta[w], keys)
            _softmax(q, at, dk, highest)


@inner
def _softmax(x: Any, at: int, size: int, highest: Any) -> None:
    """In place, of `size` elements from `at`, a multiple of 16."""
    top, sums = splat(highest), splat(np.float32(0))
    for i in range(at, at + size, LANES):
        some = exp(load(x, i) - top)
        store(x, i, some)
        sums = sums + some
    by = splat(np.float32(1) / total(sums))
    for i in range(at, at + size, LANES):
        store(x, i, load(x, i) * by)


@inner
def strips(width: int) -> int:
    """Tasks of a head."""
    return -(-width // STRIP)


@inner
def recall(first: int, last: int, q: Any, memory: Any, lag: int, shape: Any, y: Any) -> None:
    """Tasks first..last of (B, H, strips): y += q M.

    Args:
        q: (B, H, dk), dk a multiple of 4.
        memory: (B, lag, H, dk, dv), of which the first is read.
        lag: of what is read.
        shape: (c, H, dk, dv).
        y: (B, H, dv), in and out.
    """
    _, heads, dk, dv = shape
    for task in range(first, last):
        pair, begin = task // strips(dv), task % strips(dv) * STRIP
        b, h = pair // heads, pair % heads
        row = ((b * lag * heads) + h) * dk * dv
        for j in range(pair * dk, (pair + 1) * dk, 4):
            w0, w1, w2, w3 = splat(q[j]), splat(q[j + 1]), splat(q[j + 2]), splat(q[j + 3])
            for i in range(begin, min(begin + STRIP, dv), LANES):
                some = add_product(load(y, pair * dv + i), w0, load(memory, row + i))
                some = add_product(some, w1, load(memory, row + dv + i))
                some = add_product(some, w2, load(memory, row + 2 * dv + i))
                store(y, pair * dv + i, add_product(some, w3, load(memory, row + 3 * dv + i)))
            row += 4 * dv
