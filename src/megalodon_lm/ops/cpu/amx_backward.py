"""Gradients of attention of a group of queries with all matrix products in AMX tiles; see amx and amx_blocks.

Keys are taken in tiles of some blocks. Each block of keys meets all queries that see it, computes the weights anew, and
has its own gradients at once; then each block of queries adds what the tile of keys gives to its gradients.
"""

from typing import Any, NamedTuple

import numpy as np

from .amx import BLOCK, clear, enter_tiles, leave_tiles, load_sums, multiply, store_sums
from .amx_blocks import BLOCK_WORDS, Group, num_blocks, pack, pack_transposed, read_rows, scratch, write_rows
from .simd import LANES, compiled, exp, inner, load, splat, store, total
from .team import share

TOGETHER = 2  # blocks of keys for each time that the queries come from the outer caches
KEY_BLOCKS = 8  # of a tile of keys


class Queries(NamedTuple):
    """Scratch for what the queries of a group bring: packed blocks as words, H * blocks of queries * d / 32 of them.

    `logs` and `deltas` are (H * blocks of queries * 32,) float32: logarithms of the sums of the exponentials, and
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

    `keys` is (H, dk, KEY_BLOCKS * 32) uint16, flat; `scores` are packed blocks of gradients of scores, H * blocks of
    queries * KEY_BLOCKS of them; `sums` are the gradients of the queries so far, (H, blocks of queries, dk, 32)
    float32, flat, zeros at first.
    """

    keys: Any
    scores: Any
    sums: Any


@inner
def _pack_queries(first: int, last: int, q: Any, grad: Any, group: Any, result: Any, queries: Any) -> None:
    q_transposed, grad_transposed, q_pairs, grad_pairs, logs, deltas = queries
    out, sums = result
    row, begin, end, _ = group
    queries_alone = Group(row, begin, end, 0)
    dk, dv = q.shape[3], out.shape[3]
    blocks = num_blocks(end - begin)
    words = scratch(BLOCK * max(dk, dv) // 2)
    rows = words.view(np.uint16)
    for task in range(first, last):
        h, start = task // blocks, task % blocks * BLOCK
        block = start // BLOCK
        read_rows(q, q, queries_alone, h, start, rows)
        pack_transposed(words, dk, q_transposed, task * (dk // BLOCK) * BLOCK_WORDS, BLOCK_WORDS)
        to = (h * (dk // BLOCK) * blocks + block) * BLOCK_WORDS
        pack(rows, 0, dk, dk, q_pairs, to, blocks * BLOCK_WORDS)
        read_rows(grad, grad, queries_alone, h, start, rows)
        pack_transposed(words, dv, grad_transposed, task * (dv // BLOCK) * BLOCK_WORDS, BLOCK_WORDS)
        to = (h * (dv // BLOCK) * blocks + block) * BLOCK_WORDS
        pack(rows, 0, dv, dv, grad_pairs, to, blocks * BLOCK_WORDS)
        for r in range(BLOCK):
            at, delta, log = task * BLOCK + r, np.float32(0), np.float32(0)
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
    for r in range(BLOCK):
        low, high = max(bounds[r, 0] - query, 0), min(bounds[r, 1] - query, BLOCK)
        one, other = to + r * width, to + (BLOCK + r) * width
        for i in range(0, BLOCK, LANES):
            weight = exp(load(scores, r * BLOCK + i) - load(logs, at + i))
            store(weights, one + i, weight)
            store(weights, other + i, weight * (load(grads, r * BLOCK + i) - load(deltas, at + i)))
        for i in range(min(low, BLOCK)):
            weights[one + i] = 0
            weights[other + i] = 0
        for i in range(max(high, 0), BLOCK):
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
    """One task is TOGETHER blocks of keys of a head, out of `tile` blocks from key `start` on."""
    _, k, v, keys, values = given
    _, grad_k, grad_v, grad_keys, grad_values = grads
    q_transposed, grad_transposed, q_pairs, grad_pairs, logs, deltas = queries
    turned, packed_scores, _ = exchange
    _, begin, end, before = group
    dk, dv = k.shape[3], v.shape[3]
    blocks = num_blocks(end - begin)
    width = blocks * BLOCK
    parts = -(-tile // TOGETHER)
    k_rows = scratch(TOGETHER * BLOCK * dk // 2).view(np.uint16)
    v_rows = scratch(TOGETHER * BLOCK * dv // 2).view(np.uint16)
    weights = scratch(TOGETHER * BLOCK * width).view(np.uint16)
    left, right = scratch(BLOCK * BLOCK).view(np.float32), scratch(BLOCK * BLOCK).view(np.float32)
    bounds = np.empty((TOGETHER, BLOCK, 2), np.int64)
    seen = np.empty((TOGETHER, 2), np.int64)  # first block of queries that sees a block of keys, and the one after
    scale = np.ones(BLOCK, np.float32)
    own = enter_tiles(tiles)
    for task in range(first, last):
        h, part = task // parts, task % parts * TOGETHER
        count = min(TOGETHER, tile - part)
        for b in range(count):
            key = start + (part + b) * BLOCK
            read_rows(keys, k, group, h, key, k_rows[b * BLOCK * dk :])
            read_rows(values, v, group, h, key, v_rows[b * BLOCK * dv :])
            for d in range(dk):
                for r in range(BLOCK):
                    turned[((h * dk + d) * tile + part + b) * BLOCK + r] = k_rows[(b * BLOCK + r) * dk + d]
            high = 0
            for r in range(BLOCK):
                token = max(key + r - before, 0)
                bounds[b, r, 0], bounds[b, r, 1] = token, ends[token] if key + r < before + end - begin else 0
                high = max(high, bounds[b, r, 1])
            seen[b, 0], seen[b, 1] = bounds[b, 0, 0] // BLOCK, num_blocks(high)
        for j in range(seen[0, 0], blocks):
            at, query = h * blocks + j, j * BLOCK
            for b in range(count):
                to = (at * tile + part + b) * BLOCK_WORDS
                if seen[b, 0] <= j < seen[b, 1]:
                    clear(own)
                    words = at * dk // BLOCK * BLOCK_WORDS
                    multiply(own, k_rows, b * BLOCK * dk, dk, q_transposed, words, BLOCK_WORDS, dk // BLOCK)
                    store_sums(own, left, 0, BLOCK)
                    clear(own)
                    words = at * dv // BLOCK * BLOCK_WORDS
                    multiply(own, v_rows, b * BLOCK * dv, dv, grad_transposed, words, BLOCK_WORDS, dv // BLOCK)
                    store_sums(own, right, 0, BLOCK)
                    row = 2 * b * BLOCK * width + query
                    _weight_gradients(left, right, logs, deltas, at * BLOCK, bounds[b], query, weights, row, width)
                    pack(weights, row + BLOCK * width, width, BLOCK, packed_scores, to, 0)
                else:
                    for i in range(BLOCK_WORDS):
                        packed_scores[to + i] = 0
        for c in range((dv + dk) // BLOCK):
            for b in range(count):
                low, high = seen[b]
                key = start + (part + b) * BLOCK
                row = 2 * b * BLOCK * width + low * BLOCK
                clear(own)
                if c < dv // BLOCK:
                    at = ((h * (dv // BLOCK) + c) * blocks + low) * BLOCK_WORDS
                    multiply(own, weights, row, width, grad_pairs, at, BLOCK_WORDS, high - low)
                    store_sums(own, left, 0, BLOCK)
                    write_rows(left, scale, c * BLOCK, grad_values, grad_v, group, h, key)
                else:
                    d = c - dv // BLOCK
                    at = ((h * (dk // BLOCK) + d) * blocks + low) * BLOCK_WORDS
                    multiply(own, weights, row + BLOCK * width, width, q_pairs, at, BLOCK_WORDS, high - low)
                    store_sums(own, left, 0, BLOCK)
                    write_rows(left, scale, d * BLOCK, grad_keys, grad_k, group, h, key)
    leave_tiles(own)


@inner
def _return_to_queries(
    first: int, last: int, tiles: Any, start: int, tile: int, dk: int, group: Any, exchange: Any
) -> None:
    turned, packed_scores, sums = exchange
    blocks = num_blocks(group.end - group.begin)
    own = enter_tiles(tiles)
    for task in range(first, last):
        h, query = task // blocks, task % blocks * BLOCK
        seen = min(tile, num_blocks(group.before + query - start) + 1)
        if seen > 0:
            for d in range(0, dk, BLOCK):
                to = (task * dk + d) * BLOCK
                load_sums(own, sums, to, BLOCK)
                at, stride = (h * dk + d) * tile * BLOCK, tile * BLOCK
                multiply(own, turned, at, stride, packed_scores, task * tile * BLOCK_WORDS, BLOCK_WORDS, seen)
                store_sums(own, sums, to, BLOCK)
    leave_tiles(own)


@inner
def _write_queries(first: int, last: int, sums: Any, group: Any, grad_q: Any) -> None:
    """Sums (H, blocks, dk, 32) to tokens of (B, L, H, dk)."""
    row, begin, end, _ = group
    dk = grad_q.shape[3]
    blocks = num_blocks(end - begin)
    turned = np.empty(dk, np.float32)
    for task in range(first, last):
        h, query = task // blocks, task % blocks * BLOCK
        for r in range(min(BLOCK, end - begin - query)):
            for d in range(dk):
                turned[d] = sums[(task * dk + d) * BLOCK + r]
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
    """Gradients of `amx_forward.attend`.

    Args:
        threads: from num_threads().
        tiles: PROCESSOR or EMULATED.
        grad: (B, L, H, dv) of the output, bf16 as uint16.
        given: Operands, as there.
        group: Group.
        ends: (n,) the query of the group after the last one that sees a token.
        result: Result, from there.
        queries: Queries, scratch.
        exchange: Exchange, scratch.
        grads: Operands, out: gradients of the given ones.
    """
    heads, dk = given.q.shape[2], given.q.shape[3]
    blocks = num_blocks(group.end - group.begin)
    key_blocks = num_blocks(group.before + group.end - group.begin)
    share(_pack_queries, threads, heads * blocks, (given.q, grad, group, result, queries))
    for first in range(0, key_blocks, KEY_BLOCKS):
        start, tile = first * BLOCK, min(KEY_BLOCKS, key_blocks - first)
        tasks = heads * -(-tile // TOGETHER)
        share(
            _return_to_keys, threads, tasks, (tiles, start, tile, given, group, ends, queries, exchange, grads)
        )  # fmt: skip
        share(_return_to_queries, threads, heads * blocks, (tiles, start, tile, dk, group, exchange))
    share(_write_queries, threads, heads * blocks, (exchange.sums, group, grads.q))
