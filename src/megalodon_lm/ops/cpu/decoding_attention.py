"""Attention of one new token a row to its unfinished chunk, and the cache's new entry; see decoding_kernels."""

from typing import Any

import numpy as np

from . import scalars
from .elementwise_kernels import silu
from .simd import LANES, add_product, exp, inner, load, sigmoid, splat, store, total

SPLIT = 128  # keys in one task of attention


@inner
def head_scale(z: Any, at: int, dk: int, eps: float) -> Any:
    """1 over the root mean square of one head."""
    square = np.float32(0)
    for i in range(dk):
        square += z[at + i] * z[at + i]
    return np.float32(1 / np.sqrt(square / np.float32(dk) + np.float32(eps)))


@inner
def enter_cache(
    first: int,
    last: int,
    z: Any,
    v: Any,
    gamma: Any,
    beta: Any,
    positions: Any,
    cos: Any,
    sin: Any,
    shape: Any,
    choices: Any,
    q: Any,
    keys: Any,
    values: Any,
) -> None:
    """Rows first..last: normalise z per head, make and rotate the query and the key, and store key and value."""
    size, chunks, heads, dk, dv = shape
    eps, normalized, rotary_heads = choices
    one, zero = np.float32(1), np.float32(0)
    for b in range(first, last):
        entry = b * chunks * size + positions[b] % (chunks * size)
        turn = (positions[b] % size if chunks == 1 else b) * dk // 2
        for h in range(heads):
            at = (b * heads + h) * dk
            scale = head_scale(z, at, dk, eps) if normalized else one
            to = (entry * heads + h) * dk
            for i in range(0, dk, 2):
                c, s = (cos[turn + i // 2], sin[turn + i // 2]) if h < rotary_heads else (one, zero)
                even, odd = z[at + i] * scale, z[at + i + 1] * scale
                w = h * dk + i
                a, o = even * gamma[w] + beta[w], odd * gamma[w + 1] + beta[w + 1]
                q[at + i], q[at + i + 1] = a * c - o * s, a * s + o * c
                w += heads * dk
                a, o = even * gamma[w] + beta[w], odd * gamma[w + 1] + beta[w + 1]
                keys[to + i] = scalars.rounded(a * c - o * s, keys)
                keys[to + i + 1] = scalars.rounded(a * s + o * c, keys)
        silu(v, b * heads * dv, values, entry * heads * dv, heads * dv)


@inner
def _weights(at: int, count: int, scores: Any, summary: Any, to: int) -> None:
    """Turn SPLIT scores into e^(score - highest), and note the highest and the sum."""
    highest = np.float32(-np.inf)
    for j in range(count):
        highest = max(highest, scores[at + j])
    whole = -(-count // LANES) * LANES
    for j in range(count, whole):
        scores[at + j] = np.float32(-np.inf)
    top = splat(highest)
    for j in range(0, whole, LANES):
        store(scores, at + j, exp(load(scores, at + j) - top))
    weights = np.float32(0)
    for j in range(count):
        weights += scores[at + j]
    summary[to], summary[to + 1] = highest, weights


@inner
def _seen(position: int, chunk: int, chunks: int, size: int) -> int:
    """How many keys a token sees of one of the chunks held in a ring: those of its own up to itself, all of another.

    Held are its own and, after the first, the one before.
    """
    if position // size % chunks == chunk:
        return position % size + 1
    return size if position >= size else 0


@inner
def attend(
    first: int,
    last: int,
    splits: int,
    q: Any,
    keys: Any,
    values: Any,
    positions: Any,
    shape: Any,
    scores: Any,
    summary: Any,
    partial: Any,
) -> None:
    """Tasks first..last of (B, chunks, splits): softmax attention to SPLIT keys, not yet divided by its sum of weights.

    The heads go together, so that keys and values are read in the order in which they lie.

    Args:
        scores: (tasks, H, SPLIT), scratch.
        summary: (tasks, H, 2), out: highest score and sum of weights.
        partial: (tasks, H, dv), out.
    """
    size, chunks, heads, dk, dv = shape
    zero = splat(np.float32(0))
    for task in range(first, last):
        chunk, begin = task // splits, task % splits * SPLIT
        b = chunk // chunks
        count = min(SPLIT, _seen(positions[b], chunk % chunks, chunks, size) - begin)
        mine = task * heads * SPLIT
        key = (chunk * size + begin) * heads * dk
        for j in range(max(count, 0)):
            for h in range(heads):
                at = (b * heads + h) * dk
                sums = load(q, at) * load(keys, key)
                for i in range(LANES, dk, LANES):
                    sums = add_product(sums, load(q, at + i), load(keys, key + i))
                scores[mine + h * SPLIT + j] = total(sums)
                key += dk
        for h in range(heads):
            _weights(mine + h * SPLIT, count, scores, summary, 2 * (task * heads + h))

        out, row = task * heads * dv, heads * dv
        value = (chunk * size + begin) * row
        for i in range(0, row, LANES):
            store(partial, out + i, zero)
        for j in range(0, count - 3, 4):
            for h in range(heads):
                at = mine + h * SPLIT + j
                w0, w1, w2, w3 = splat(scores[at]), splat(scores[at + 1]), splat(scores[at + 2]), splat(scores[at + 3])
                for i in range(h * dv, (h + 1) * dv, LANES):
                    some = add_product(load(partial, out + i), w0, load(values, value + i))
                    some = add_product(some, w1, load(values, value + row + i))
                    some = add_product(some, w2, load(values, value + 2 * row + i))
                    store(partial, out + i, add_product(some, w3, load(values, value + 3 * row + i)))
            value += 4 * row
        for j in range(max(count, 0) // 4 * 4, count):
            for h in range(heads):
                w0 = splat(scores[mine + h * SPLIT + j])
                for i in range(h * dv, (h + 1) * dv, LANES):
                    store(partial, out + i, add_product(load(partial, out + i), w0, load(values, value + i)))
            value += row


@inner
def combine(
    first: int, last: int, splits: int, heads: int, dv: int, summary: Any, partial: Any, gate: Any, y: Any
) -> None:
    """Pairs first..last of (B, H): join the splits, and multiply by silu of the gate."""
    zero = splat(np.float32(0))
    for pair in range(first, last):
        begin = pair // heads * splits * heads + pair % heads
        parts = range(begin, begin + splits * heads, heads)
        highest = np.float32(-np.inf)
        for part in parts:
            highest = max(highest, summary[2 * part])
        weights = np.float32(0)
        for part in parts:
            summary[2 * part] = np.float32(np.exp(summary[2 * part] - highest))
            weights += summary[2 * part] * summary[2 * part + 1]
        for i in range(0, dv, LANES):
            some = zero
            for part in parts:
                some = add_product(some, splat(summary[2 * part]), load(partial, part * dv + i))
            g = load(gate, pair * dv + i)
            store(y, pair * dv + i, some * (g * sigmoid(g)) / splat(weights))
