"""Causal attention of a group of queries with both its matrix products in squares; see squares and squares_packing."""

from typing import Any, NamedTuple

import numpy as np

from .attention_operands import Group
from .simd import LANES, compiled, exp, highest, inner, larger, load, splat, store, total
from .squares import SQUARE, enter_tiles, leave_tiles, multiply, store_sums
from .squares_packing import (
    num_strips,
    pack_head,
    pack_transposed,
    read_rows,
    scratch,
    square_rows,
    square_words,
    write_rows,
)
from .team import share

TOGETHER = 2  # strips of queries for each time that the keys come from the outer caches


class Packed(NamedTuple):
    """Packed squares as words: H * strips of keys * dk / 32 of keys, H * dv / 32 * strips of keys of values."""

    keys: Any
    values: Any


@inner
def _pack_keys(first: int, last: int, given: Any, group: Any, packed: Any) -> None:
    _, k, v, keys, values = given
    dk, dv = k.shape[3], v.shape[3]
    strips = num_strips(group.before + group.end - group.begin)
    rows, words = scratch(square_rows(k) * max(dk, dv)).view(k.dtype), square_words(k)
    for task in range(first, last):
        h, strip = task // strips, task % strips
        read_rows(keys, k, group, h, strip * SQUARE, rows)
        pack_transposed(rows, dk, packed.keys, task * (dk // SQUARE) * words, words)
        to = (h * (dv // SQUARE) * strips + strip) * words
        pack_head(values, v, group, h, strip * SQUARE, rows, packed.values, to, strips * words)


@inner
def _softmax_row(scores: Any, at: int, begin: int, low: int, high: int, end: int, weights: Any, to: int) -> Any:
    """e^(score - highest) of the scores low..high, zero elsewhere in begin..end; gives the highest and the sum."""
    for i in range(begin, low):
        scores[at + i] = -np.inf
    for i in range(high, end):
        scores[at + i] = -np.inf
    top = load(scores, at + begin)
    for i in range(begin + LANES, end, LANES):
        top = larger(top, load(scores, at + i))
    peak = highest(top)
    top, sums = splat(peak), splat(np.float32(0))
    for i in range(begin, end, LANES):
        weight = exp(load(scores, at + i) - top)
        sums = sums + weight
        store(weights, to + i, weight)
    for i in range(begin, low):
        weights[to + i] = 0
    for i in range(high, end):
        weights[to + i] = 0
    return peak, total(sums)


@inner
def _attend_strips(
    first: int, last: int, tiles: Any, q: Any, group: Any, slots: Any, packed_k: Any, packed_v: Any, result: Any
) -> None:
    """One task is TOGETHER strips of queries of a head."""
    out, sums = result
    row, begin, end, before, _ = group
    queries_alone = Group(row, begin, end, 0, 0)
    dk, dv = q.shape[3], out.shape[3]
    size = TOGETHER * SQUARE
    parts = -(-(end - begin) // size)
    strips = num_strips(before + end - begin)
    width = strips * SQUARE
    words = square_words(q)
    rows = scratch(square_rows(q) * dk).view(q.dtype)
    scores = scratch(SQUARE * width).view(np.float32)
    weights = scratch(TOGETHER * square_rows(q) * width).view(q.dtype)
    mixed = scratch(SQUARE * SQUARE).view(np.float32)
    scale = np.empty((TOGETHER, SQUARE), np.float32)
    seen = np.empty((TOGETHER, 2), np.int64)  # first strip of keys that a strip of queries sees, and the one after
    own = enter_tiles(tiles)
    for task in range(first, last):
        h, start = task // parts, (parts - 1 - task % parts) * size  # the longest first
        count = num_strips(min(size, end - begin - start))
        for b in range(count):
            query = start + b * SQUARE
            queries = min(SQUARE, end - begin - query)
            read_rows(q, q, queries_alone, h, query, rows)
            low = before + query - slots[query]
            for r in range(1, queries):
                low = min(low, before + query + r - slots[query + r])
            low, high = low // SQUARE, num_strips(before + query + queries)
            seen[b, 0], seen[b, 1] = low, high
            for j in range(low, high):
                at = (h * strips + j) * dk // SQUARE * words
                multiply(own, rows, 0, dk, packed_k, at, words, dk // SQUARE)
                store_sums(own, scores, j * SQUARE, width)
            left, right = low * SQUARE, high * SQUARE
            for r in range(SQUARE):
                to = (b * SQUARE + r) * width
                if r < queries:
                    key = before + query + r
                    lowest = key - slots[query + r]
                    peak, power = _softmax_row(scores, r * width, left, lowest, key + 1, right, weights, to)
                    scale[b, r] = np.float32(1) / power
                    sums[h, query + r] = peak + np.log(power)
                else:
                    for i in range(left, right):
                        weights[to + i] = 0
        for c in range(dv // SQUARE):
            for b in range(count):
                low, high = seen[b]
                at = ((h * (dv // SQUARE) + c) * strips + low) * words
                multiply(own, weights, b * SQUARE * width + low * SQUARE, width, packed_v, at, words, high - low)
                store_sums(own, mixed, 0, SQUARE)
                write_rows(mixed, scale[b], c * SQUARE, out, out, queries_alone, h, start + b * SQUARE)
    leave_tiles(own)


@compiled
def attend(threads: int, tiles: Any, given: Any, group: Any, slots: Any, packed: Any, result: Any) -> None:
    """Attention of a group.

    Args:
        threads: from num_threads().
        tiles: AMX, VECTORS or EMULATED.
        given: Operands, float32 or bf16 (as uint16); d a multiple of 32.
        group: Group.
        slots: (n,) of the group, how many tokens before it a token sees.
        packed: Packed, scratch.
        result: Result, out.
    """
    queries = group.end - group.begin
    heads = given.q.shape[2]
    share(_pack_keys, threads, heads * num_strips(group.before + queries), (given, group, packed))
    tasks = heads * -(-queries // (TOGETHER * SQUARE))
    share(_attend_strips, threads, tasks, (tiles, given.q, group, slots, packed.keys, packed.values, result))
