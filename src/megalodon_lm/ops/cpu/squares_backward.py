"""Gradients of attention of a group of queries with all matrix products in squares; see squares and squares_packing.

Keys are taken in tiles of some strips. Each strip of keys meets all queries that see it, computes the weights anew, and
has its own gradients at once; then each strip of queries adds what the tile of keys gives to its gradients.
"""

from typing import Any, NamedTuple

import numpy as np

from .attention_operands import Group
from .simd import LANES, compiled, exp, inner, load, splat, store, total
from .squares import SQUARE, add_product, enter_tiles, leave_tiles, load_sums, multiply, store_sums
from .squares_packing import (
    num_strips,
    pack,
    pack_transposed,
    read_rows,
    scratch,
    square_rows,
    square_words,
    write_rows,
)
from .team import share

TOGETHER = 2  # strips of keys for each time that the queries come from the outer caches
KEY_STRIPS = 8  # of a tile of keys


class Queries(NamedTuple):
    """Scratch for what the queries of a group bring: packed squares as words, H * strips of queries * d / 32 of them.

    `logs` and `deltas` are (H * strips of queries * 32,) float32: logarithms of the sums of the exponentials, and
    products of the output with its gradient.
    """

    q_transposed: Any
    grad_transposed: Any
    q_pairs: Any
    grad_pairs: Any
    logs: Any
    deltas: Any


class Exchange(NamedTuple):
    """Scratch for what a tile of keys leaves to the queries.

    `keys` is (H, dk, KEY_STRIPS * 32) of the type of queries, flat; `scores` are packed squares of gradients of scores,
    H * strips of queries * KEY_STRIPS of them; `sums` are the gradients of the queries so far, (H, strips of queries,
    dk, 32) float32, flat, zeros at first.
    """

    keys: Any
    scores: Any
    sums: Any


@inner
def _pack_queries(first: int, last: int, q: Any, grad: Any, group: Any, result: Any, queries: Any) -> None:
    q_transposed, grad_transposed, q_pairs, grad_pairs, logs, deltas = queries
    out, sums = result
    row, begin, end, _, _ = group
    queries_alone = Group(row, begin, end, 0, 0)
    dk, dv = q.shape[3], out.shape[3]
    strips = num_strips(end - begin)
    rows, words = scratch(square_rows(q) * max(dk, dv)).view(q.dtype), square_words(q)
    for task in range(first, last):
        h, start = task // strips, task % strips * SQUARE
        strip = start // SQUARE
        read_rows(q, q, queries_alone, h, start, rows)
        pack_transposed(rows, dk, q_transposed, task * (dk // SQUARE) * words, words)
        to = (h * (dk // SQUARE) * strips + strip) * words
        pack(rows, 0, dk, dk, q_pairs, to, strips * words)
        read_rows(grad, grad, queries_alone, h, start, rows)
        pack_transposed(rows, dv, grad_transposed, task * (dv // SQUARE) * words, words)
        to = (h * (dv // SQUARE) * strips + strip) * words
        pack(rows, 0, dv, dv, grad_pairs, to, strips * words)
        for r in range(SQUARE):
            at, delta, log = task * SQUARE + r, np.float32(0), np.float32(0)
            if start + r < end - begin:
                output, part = out[row, begin + start + r, h], splat(np.float32(0))
                for i in range(0, dv, LANES):
                    part = part + load(rows, r * dv + i) * load(output, i)
                delta, log = total(part), sums[h, start + r]
            logs[at], deltas[at] = log, delta


@inner
def _weight_gradients(
    scores: Any, grads: Any, logs: Any, deltas: Any, at: int, bounds: Any, query: int, weights: Any, to: int, width: int
) -> None:
    """Scores of 32 keys by 32 queries and gradients of their weights to weights and gradients of scores.

    Args:
        scores, grads: 32 x 32.
        logs, deltas: of the queries, from `at`.
        bounds: (32, 2) first query that sees the key, and first one after that does not.
        query: the first of them.
        weights: (2, 32, width) as one row, out: weights, and gradients of scores; from `to`.
    """
    for r in range(SQUARE):
        low, high = max(bounds[r, 0] - query, 0), min(bounds[r, 1] - query, SQUARE)
        one, other = to + r * width, to + (SQUARE + r) * width
        for i in range(0, SQUARE, LANES):
            weight = exp(load(scores, r * SQUARE + i) - load(logs, at + i))
            store(weights, one + i, weight)
            store(weights, other + i, weight * (load(grads, r * SQUARE + i) - load(deltas, at + i)))
        for i in range(min(low, SQUARE)):
            weights[one + i] = 0
            weights[other + i] = 0
        for i in range(max(high, 0), SQUARE):
            weights[one + i] = 0
            weights[other + i] = 0


@inner
def _return_to_keys(
    first: int,
    last: int,
    tiles: Any,
    start: int,
    tile: int,
    given: Any,
    group: Any,
    ends: Any,
    queries: Any,
    exchange: Any,
    grads: Any,
) -> None:
    """One task is TOGETHER strips of keys of a head, out of `tile` strips from key `start` on."""
    _, k, v, keys, values = given
    _, grad_k, grad_v, grad_keys, grad_values = grads
    q_transposed, grad_transposed, q_pairs, grad_pairs, logs, deltas = queries
    turned, packed_scores, _ = exchange
    _, begin, end, before, _ = group
    dk, dv = k.shape[3], v.shape[3]
    strips = num_strips(end - begin)
    width = strips * SQUARE
    parts = -(-tile // TOGETHER)
    words, height = square_words(k), TOGETHER * square_rows(k)
    k_rows, v_rows = scratch(height * dk).view(k.dtype), scratch(height * dv).view(k.dtype)
    weights = scratch(2 * height * width).view(k.dtype)
    left, right = scratch(SQUARE * SQUARE).view(np.float32), scratch(SQUARE * SQUARE).view(np.float32)
    bounds = np.empty((TOGETHER, SQUARE, 2), np.int64)
    seen = np.empty((TOGETHER, 2), np.int64)  # first strip of queries that sees a strip of keys, and the one after
    scale = np.ones(SQUARE, np.float32)
    own = enter_tiles(tiles)
    for task in range(first, last):
        h, part = task // parts, task % parts * TOGETHER
        count = min(TOGETHER, tile - part)
        for b in range(count):
            key = start + (part + b) * SQUARE
            read_rows(keys, k, group, h, key, k_rows[b * SQUARE * dk :])
            read_rows(values, v, group, h, key, v_rows[b * SQUARE * dv :])
            for d in range(dk):
                for r in range(SQUARE):
                    turned[((h * dk + d) * tile + part + b) * SQUARE + r] = k_rows[(b * SQUARE + r) * dk + d]
            high = 0
            for r in range(SQUARE):
                bounds[b, r, 0] = max(key + r - before, 0)
                bounds[b, r, 1] = ends[key + r] if key + r < len(ends) else 0
                high = max(high, bounds[b, r, 1])
            seen[b, 0], seen[b, 1] = bounds[b, 0, 0] // SQUARE, num_strips(high)
        for j in range(seen[0, 0], strips):
            at, query = h * strips + j, j * SQUARE
            for b in range(count):
                to = (at * tile + part + b) * words
                if seen[b, 0] <= j < seen[b, 1]:
                    place = at * dk // SQUARE * words
                    multiply(own, k_rows, b * SQUARE * dk, dk, q_transposed, place, words, dk // SQUARE)
                    store_sums(own, left, 0, SQUARE)
                    place = at * dv // SQUARE * words
                    multiply(own, v_rows, b * SQUARE * dv, dv, grad_transposed, place, words, dv // SQUARE)
                    store_sums(own, right, 0, SQUARE)
                    row = 2 * b * SQUARE * width + query
                    _weight_gradients(left, right, logs, deltas, at * SQUARE, bounds[b], query, weights, row, width)
                    pack(weights, row + SQUARE * width, width, SQUARE, packed_scores, to, 0)
                else:
                    for i in range(words):
                        packed_scores[to + i] = 0
        for c in range((dv + dk) // SQUARE):
            for b in range(count):
                low, high = seen[b]
                key = start + (part + b) * SQUARE
                row = 2 * b * SQUARE * width + low * SQUARE
                if c < dv // SQUARE:
                    at = ((h * (dv // SQUARE) + c) * strips + low) * words
                    multiply(own, weights, row, width, grad_pairs, at, words, high - low)
                    store_sums(own, left, 0, SQUARE)
                    write_rows(left, scale, c * SQUARE, grad_values, grad_v, group, h, key)
                else:
                    d = c - dv // SQUARE
                    at = ((h * (dk // SQUARE) + d) * strips + low) * words
                    multiply(own, weights, row + SQUARE * width, width, q_pairs, at, words, high - low)
                    store_sums(own, left, 0, SQUARE)
                    write_rows(left, scale, d * SQUARE, grad_keys, grad_k, group, h, key)
    leave_tiles(own)


@inner
def _return_to_queries(
    first: int, last: int, tiles: Any, start: int, tile: int, dk: int, group: Any, exchange: Any
) -> None:
    turned, packed_scores, sums = exchange
    words = square_words(turned)
    strips = num_strips(group.end - group.begin)
    own = enter_tiles(tiles)
    for task in range(first, last):
        h, query = task // strips, task % strips * SQUARE
        seen = min(tile, num_strips(group.before + query - start) + 1)
        if seen > 0:
            for d in range(0, dk, SQUARE):
                to = (task * dk + d) * SQUARE
                load_sums(own, sums, to, SQUARE)
                at, stride = (h * dk + d) * tile * SQUARE, tile * SQUARE
                add_product(own, turned, at, stride, packed_scores, task * tile * words, words, seen)
                store_sums(own, sums, to, SQUARE)
    leave_tiles(own)


@inner
def _write_queries(first: int, last: int, sums: Any, group: Any, grad_q: Any) -> None:
    """Sums (H, strips, dk, 32) to tokens of (B, L, H, dk)."""
    row, begin, end, _, _ = group
    dk = grad_q.shape[3]
    strips = num_strips(end - begin)
    turned = np.empty(dk, np.float32)
    for task in range(first, last):
        h, query = task // strips, task % strips * SQUARE
        for r in range(min(SQUARE, end - begin - query)):
            for d in range(dk):
                turned[d] = sums[(task * dk + d) * SQUARE + r]
            target = grad_q[row, begin + query + r, h]
            for d in range(0, dk, LANES):
                store(target, d, load(turned, d))


@compiled
def attend_backward(
    threads: int,
    tiles: Any,
    grad: Any,
    given: Any,
    group: Any,
    ends: Any,
    result: Any,
    queries: Any,
    exchange: Any,
    grads: Any,
) -> None:
    """Gradients of `squares_forward.attend`.

    Args:
        threads: from num_threads().
        tiles: AMX, VECTORS or EMULATED.
        grad: (B, L, H, dv) of the output, float32 or bf16 (as uint16).
        given: Operands, as there.
        group: Group.
        ends: (before + n,) the query of the group after the last one that sees each of its keys.
        result: Result, from there.
        queries: Queries, scratch.
        exchange: Exchange, scratch.
        grads: Operands, out: gradients of the given ones.
    """
    heads, dk = given.q.shape[2], given.q.shape[3]
    strips = num_strips(group.end - group.begin)
    key_strips = num_strips(group.before + group.end - group.begin)
    share(_pack_queries, threads, heads * strips, (given.q, grad, group, result, queries))
    for first in range(0, key_strips, KEY_STRIPS):
        start, tile = first * SQUARE, min(KEY_STRIPS, key_strips - first)
        tasks = heads * -(-tile // TOGETHER)
        share(
            _return_to_keys, threads, tasks, (tiles, start, tile, given, group, ends, queries, exchange, grads)
        )  # fmt: skip
        share(_return_to_queries, threads, heads * strips, (tiles, start, tile, dk, group, exchange))
    share(_write_queries, threads, heads * strips, (exchange.sums, group, grads.q))
