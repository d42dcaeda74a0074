"""Causal attention of a group of queries with all its matrix products in AMX tiles; see amx and attention_kernels.

A group has n queries and, with those of the cache before it, m keys, of H heads. Queries, keys and values are taken in
blocks of 32, the last one filled with zeros.
"""

from typing import Any

import numpy as np

from .amx import (
    BLOCK,
    BLOCK_WORDS,
    clear,
    configure,
    enter_tiles,
    load_sums,
    multiply,
    pack,
    pack_transposed,
    scratch,
    store_sums,
)
from .simd import LANES, compiled, exp, highest, inner, larger, load, splat, store, total
from .team import share

TOGETHER = 2  # blocks of one side for each time that the other side comes from the outer caches


@inner
def _read_rows(cached: Any, piece: Any, group: Any, h: int, start: int, rows: Any) -> None:
    """Rows start..start + 32 of a head, from the cache (B, c, H, d) at first, then from the piece (B, L, H, d)."""
    row, begin, end, before = group
    width = piece.shape[3]
    count = before + end - begin
    for r in range(BLOCK):
        key, to = start + r, r * width
        if key < before:
            for i in range(width):
                rows[to + i] = cached[row, key, h, i]
        elif key < count:
            for i in range(width):
                rows[to + i] = piece[row, begin + key - before, h, i]
        else:
            for i in range(width):
                rows[to + i] = 0


@inner
def _write_rows(sums: Any, scale: Any, columns: int, cached: Any, piece: Any, group: Any, h: int, start: int) -> None:
    """Write 32 x 32 sums, scaled by rows, to 32 columns of the rows that `_read_rows` reads."""
    row, begin, end, before = group
    for r in range(min(BLOCK, before + end - begin - start)):
        key = start + r
        target = cached[row, key, h] if key < before else piece[row, begin + key - before, h]
        for i in range(0, BLOCK, LANES):
            store(target, columns + i, load(sums, r * BLOCK + i) * splat(scale[r]))


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
def _pack_keys(
    first: int, last: int, k: Any, v: Any, keys: Any, values: Any, group: Any, blocks: int, packed_k: Any, packed_v: Any
) -> None:
    dk, dv = k.shape[3], v.shape[3]
    words = scratch(BLOCK * max(dk, dv) // 2)
    rows = words.view(np.uint16)
    for task in range(first, last):
        h, block = task // blocks, task % blocks
        _read_rows(keys, k, group, h, block * BLOCK, rows)
        pack_transposed(words, dk, packed_k, task * (dk // BLOCK) * BLOCK_WORDS, BLOCK_WORDS)
        _read_rows(values, v, group, h, block * BLOCK, rows)
        to = (h * (dv // BLOCK) * blocks + block) * BLOCK_WORDS
        pack(rows, 0, dv, dv, packed_v, to, blocks * BLOCK_WORDS)


@inner
def _attend_blocks(
    first: int,
    last: int,
    q: Any,
    group: Any,
    blocks: int,
    packed_k: Any,
    packed_v: Any,
    slots: Any,
    out: Any,
    sums: Any,
) -> None:
    row, begin, end, before = group
    dk, dv = q.shape[3], out.shape[3]
    size = TOGETHER * BLOCK
    parts = -(-(end - begin) // size)
    width = blocks * BLOCK
    rows = scratch(BLOCK * dk // 2).view(np.uint16)
    scores = scratch(BLOCK * width).view(np.float32)
    weights = scratch(size * width // 2).view(np.uint16)
    mixed = scratch(BLOCK * BLOCK).view(np.float32)
    scale = np.empty((TOGETHER, BLOCK), np.float32)
    seen = np.empty((TOGETHER, 2), np.int64)
    tiles_before = enter_tiles()
    for task in range(first, last):
        h, start = task // parts, (parts - 1 - task % parts) * size  # the longest first
        count = -(-min(size, end - begin - start) // BLOCK)
        for b in range(count):
            query = start + b * BLOCK
            queries = min(BLOCK, end - begin - query)
            _read_rows(q, q, (row, begin, end, 0), h, query, rows)
            low = before + query - slots[query]
            for r in range(1, queries):
                low = min(low, before + query + r - slots[query + r])
            low, high = low // BLOCK, -(-(before + query + queries) // BLOCK)
            seen[b, 0], seen[b, 1] = low, high
            for j in range(low, high):
                clear()
                at = (h * blocks + j) * dk // BLOCK * BLOCK_WORDS
                multiply(rows, 0, dk, packed_k, at, BLOCK_WORDS, dk // BLOCK)
                store_sums(scores, j * BLOCK, width)
            left, right = low * BLOCK, high * BLOCK
            for r in range(BLOCK):
                to = (b * BLOCK + r) * width
                if r < queries:
                    key = before + query + r
                    own = key - slots[query + r]
                    peak, power = _softmax_row(scores, r * width, left, own, key + 1, right, weights, to)
                    scale[b, r] = np.float32(1) / power
                    sums[h, query + r] = peak + np.log(power)
                else:
                    for i in range(left, right):
                        weights[to + i] = 0
        for c in range(dv // BLOCK):
            for b in range(count):
                low, high = seen[b]
                clear()
                at = ((h * (dv // BLOCK) + c) * blocks + low) * BLOCK_WORDS
                multiply(weights, b * BLOCK * width + low * BLOCK, width, packed_v, at, BLOCK_WORDS, high - low)
                store_sums(mixed, 0, BLOCK)
                _write_rows(mixed, scale[b], c * BLOCK, out, out, (row, begin, end, 0), h, start + b * BLOCK)
    configure(tiles_before)


@compiled
def attend(
    threads: int,
    q: Any,
    k: Any,
    v: Any,
    keys: Any,
    values: Any,
    group: Any,
    packed_k: Any,
    packed_v: Any,
    slots: Any,
    out: Any,
    sums: Any,
) -> None:
    """Attention of a group.

    Args:
        q, k, v: (B, L, H, d), bf16 as uint16; d a multiple of 32.
        keys, values: (B, c, H, d), the entry cache.
        group: row, first and last token, cached keys before them.
        packed_k: H * blocks of keys * dk / 32 blocks, scratch.
        packed_v: H * dv / 32 * blocks of keys blocks, scratch.
        slots: (n,) of the group.
        out: (B, L, H, dv), out.
        sums: (H, n) float32, out: logarithm of the sum of the exponentials.
    """
    heads = q.shape[2]
    queries = group[2] - group[1]
    blocks = -(-(group[3] + queries) // BLOCK)
    share(_pack_keys, threads, heads * blocks, (k, v, keys, values, group, blocks, packed_k, packed_v))
    tasks = heads * -(-queries // (TOGETHER * BLOCK))
    share(_attend_blocks, threads, tasks, (q, group, blocks, packed_k, packed_v, slots, out, sums))


@inner
def _pack_queries(
    first: int,
    last: int,
    q: Any,
    grad: Any,
    out: Any,
    group: Any,
    sums: Any,
    packed: Any,
    logs: Any,
    deltas: Any,
) -> None:
    row, begin, end, _ = group
    q_transposed, grad_transposed, q_pairs, grad_pairs = packed
    dk, dv = q.shape[3], out.shape[3]
    blocks = -(-(end - begin) // BLOCK)
    words = scratch(BLOCK * max(dk, dv) // 2)
    rows = words.view(np.uint16)
    for task in range(first, last):
        h, start = task // blocks, task % blocks * BLOCK
        block = start // BLOCK
        _read_rows(q, q, (row, begin, end, 0), h, start, rows)
        pack_transposed(words, dk, q_transposed, task * (dk // BLOCK) * BLOCK_WORDS, BLOCK_WORDS)
        to = (h * (dk // BLOCK) * blocks + block) * BLOCK_WORDS
        pack(rows, 0, dk, dk, q_pairs, to, blocks * BLOCK_WORDS)
        _read_rows(grad, grad, (row, begin, end, 0), h, start, rows)
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
    scores: Any,
    grads: Any,
    logs: Any,
    deltas: Any,
    at: int,
    bounds: Any,
    queries: int,
    weights: Any,
    to: int,
    width: int,
) -> None:
    """Scores of 32 keys by 32 queries and gradients of their weights to weights and gradients of scores.

    Args:
        scores, grads: 32 x 32.
        logs, deltas: of the queries, from `at`.
        bounds: (32, 2) first query that sees the key, and first one after that does not.
        queries: the first of them.
        weights: (2, 32, width) as one row, out: weights, and gradients of scores; from `to`.
    """
    for r in range(BLOCK):
        low, high = max(bounds[r, 0] - queries, 0), min(bounds[r, 1] - queries, BLOCK)
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
    start: int,
    tile: int,
    k: Any,
    v: Any,
    keys: Any,
    values: Any,
    group: Any,
    ends: Any,
    packed: Any,
    logs: Any,
    deltas: Any,
    grad_k: Any,
    grad_v: Any,
    grad_keys: Any,
    grad_values: Any,
    turned: Any,
    packed_scores: Any,
) -> None:
    _, begin, end, before = group
    q_transposed, grad_transposed, q_pairs, grad_pairs = packed
    dk, dv = k.shape[3], v.shape[3]
    blocks = -(-(end - begin) // BLOCK)
    width = blocks * BLOCK
    parts = -(-tile // TOGETHER)
    k_rows = scratch(TOGETHER * BLOCK * dk // 2).view(np.uint16)
    v_rows = scratch(TOGETHER * BLOCK * dv // 2).view(np.uint16)
    weights = scratch(TOGETHER * BLOCK * width).view(np.uint16)
    scores, grads = scratch(BLOCK * BLOCK).view(np.float32), scratch(BLOCK * BLOCK).view(np.float32)
    bounds = np.empty((TOGETHER, BLOCK, 2), np.int64)
    seen = np.empty((TOGETHER, 2), np.int64)
    scale = np.ones(BLOCK, np.float32)
    tiles_before = enter_tiles()
    for task in range(first, last):
        h, part = task // parts, task % parts * TOGETHER
        count = min(TOGETHER, tile - part)
        for b in range(count):
            key = start + (part + b) * BLOCK
            _read_rows(keys, k, group, h, key, k_rows[b * BLOCK * dk :])
            _read_rows(values, v, group, h, key, v_rows[b * BLOCK * dv :])
            for d in range(dk):
                for r in range(BLOCK):
                    turned[((h * dk + d) * tile + part + b) * BLOCK + r] = k_rows[(b * BLOCK + r) * dk + d]
            high = 0
            for r in range(BLOCK):
                token = max(key + r - before, 0)
                bounds[b, r, 0], bounds[b, r, 1] = token, ends[token] if key + r < before + end - begin else 0
                high = max(high, bounds[b, r, 1])
            seen[b, 0], seen[b, 1] = bounds[b, 0, 0] // BLOCK, -(-high // BLOCK)
        for j in range(seen[0, 0], blocks):
            at, query = h * blocks + j, j * BLOCK
            for b in range(count):
                to = (at * tile + part + b) * BLOCK_WORDS
                if seen[b, 0] <= j < seen[b, 1]:
                    clear()
                    words = at * dk // BLOCK * BLOCK_WORDS
                    multiply(k_rows, b * BLOCK * dk, dk, q_transposed, words, BLOCK_WORDS, dk // BLOCK)
                    store_sums(scores, 0, BLOCK)
                    clear()
                    words = at * dv // BLOCK * BLOCK_WORDS
                    multiply(v_rows, b * BLOCK * dv, dv, grad_transposed, words, BLOCK_WORDS, dv // BLOCK)
                    store_sums(grads, 0, BLOCK)
                    own = 2 * b * BLOCK * width + query
                    _weight_gradients(scores, grads, logs, deltas, at * BLOCK, bounds[b], query, weights, own, width)
                    pack(weights, own + BLOCK * width, width, BLOCK, packed_scores, to, 0)
                else:
                    for i in range(BLOCK_WORDS):
                        packed_scores[to + i] = 0
        for c in range((dv + dk) // BLOCK):
            for b in range(count):
                low, high = seen[b]
                key = start + (part + b) * BLOCK
                own = 2 * b * BLOCK * width + low * BLOCK
                clear()
                if c < dv // BLOCK:
                    at = ((h * (dv // BLOCK) + c) * blocks + low) * BLOCK_WORDS
                    multiply(weights, own, width, grad_pairs, at, BLOCK_WORDS, high - low)
                    store_sums(scores, 0, BLOCK)
                    _write_rows(scores, scale, c * BLOCK, grad_values, grad_v, group, h, key)
                else:
                    d = c - dv // BLOCK
                    at = ((h * (dk // BLOCK) + d) * blocks + low) * BLOCK_WORDS
                    multiply(weights, own + BLOCK * width, width, q_pairs, at, BLOCK_WORDS, high - low)
                    store_sums(scores, 0, BLOCK)
                    _write_rows(scores, scale, d * BLOCK, grad_keys, grad_k, group, h, key)
    configure(tiles_before)


@inner
def _return_to_queries(
    first: int,
    last: int,
    start: int,
    tile: int,
    dk: int,
    blocks: int,
    before: int,
    turned: Any,
    packed_scores: Any,
    grad_q: Any,
) -> None:
    tiles_before = enter_tiles()
    for task in range(first, last):
        h, query = task // blocks, task % blocks * BLOCK
        seen = min(tile, -(-(before + query - start) // BLOCK) + 1)
        if seen > 0:
            for d in range(0, dk, BLOCK):
                to = (task * dk + d) * BLOCK
                load_sums(grad_q, to, BLOCK)
                at, stride = (h * dk + d) * tile * BLOCK, tile * BLOCK
                multiply(turned, at, stride, packed_scores, task * tile * BLOCK_WORDS, BLOCK_WORDS, seen)
                store_sums(grad_q, to, BLOCK)
    configure(tiles_before)


@inner
def _write_queries(first: int, last: int, sums: Any, group: Any, grad_q: Any) -> None:
    """Sums (H, blocks, dk, 32) to tokens of (B, L, H, dk)."""
    row, begin, end, _ = group
    dk = grad_q.shape[3]
    blocks = -(-(end - begin) // BLOCK)
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
    grad: Any,
    out: Any,
    piece: Any,
    cache: Any,
    group: Any,
    ends: Any,
    sums: Any,
    packed: Any,
    rows: Any,
    tile: int,
    turned: Any,
    packed_scores: Any,
    sums_q: Any,
    grads: Any,
    grad_cache: Any,
) -> None:
    """Gradients of `attend`, by tiles of keys against all queries; the weights are computed anew.

    Args:
        grad, out: (B, L, H, dv), bf16 as uint16.
        piece: q, k and v.
        cache: keys and values.
        group: row, first and last token, cached keys before them.
        ends: (n,) the query of the group after the last one that sees a token.
        sums: (H, n) from `attend`.
        packed: scratch of H * blocks of queries * d / 32 blocks, d in turn dk, dv, dk, dv.
        rows: scratch (2, H, queries in whole blocks) float32.
        tile: blocks of keys in a tile.
        turned: scratch (H, dk, tile * 32) uint16.
        packed_scores: scratch of H * blocks of queries * tile blocks.
        sums_q: scratch (H, blocks of queries, dk, 32) float32 of zeros, flat.
        grads: (B, L, H, d) to q, k and v, out.
        grad_cache: (B, c, H, d) to keys and values, out.
    """
    q, k, v = piece
    keys, values = cache
    grad_q, grad_k, grad_v = grads
    grad_keys, grad_values = grad_cache
    logs, deltas = rows
    _, begin, end, before = group
    heads, dk = q.shape[2], q.shape[3]
    blocks = -(-(end - begin) // BLOCK)
    key_blocks = -(-(before + end - begin) // BLOCK)
    share(_pack_queries, threads, heads * blocks, (q, grad, out, group, sums, packed, logs, deltas))
    for first in range(0, key_blocks, tile):
        some, start = min(tile, key_blocks - first), first * BLOCK
        given = (k, v, keys, values, group, ends, packed, logs, deltas)
        made = (grad_k, grad_v, grad_keys, grad_values, turned, packed_scores)
        tasks = heads * -(-some // TOGETHER)
        share(_return_to_keys, threads, tasks, (start, some, *given, *made))
        args = (start, some, dk, blocks, before, turned, packed_scores, sums_q)
        share(_return_to_queries, threads, heads * blocks, args)
    share(_write_queries, threads, heads * blocks, (sums_q, group, grad_q))
