"""What attention over chunks does between its matrix products: planning, softmax and its gradient, one query.

`slots` (B, L) says it all about a piece: how many tokens before it each token sees, of the piece and then of the entry
cache, and -1 at padding. Tokens of a run of slots that rise by one see from one token on. Those of the next run begin
there or later, so keys that two runs see lie between. Where a window slides, slots stay as they are: a token is a run.
"""

from typing import Any

import numpy as np

from .scalars import as_float, copy, maximum, rounded
from .simd import LANES, compiled, exp, inner, load, splat, store, total
from .team import share

_PART = 4 * LANES  # keys or features of a task where there are few queries
_CONTRACT = {"contract"}
_SUM = {"contract", "reassoc", "nsz"}


@compiled(fastmath=_CONTRACT)
def plan_groups(slots: Any, most: int, ends: Any, groups: Any) -> int:
    """Cut rows into groups: one run, or several whole runs of together no more than `most` keys, or as many queries
    where a window slides.

    Args:
        slots: (B, L).
        most: keys.
        ends: (B, n + L), out: the token after the last one that sees each of the n last entries of the cache, in the
            order of the tokens, and each token.
        groups: (B * L, 5), out: row, first and last token, keys before them, entries of the row's cache.

    Returns:
        Number of groups.
    """
    count = 0
    entries = ends.shape[1] - slots.shape[1]
    for b in range(slots.shape[0]):
        at, room, low = 0, 0, -max(slots[b, 0], 0)
        while at < slots.shape[1] and slots[b, at] >= 0:
            end = at + 1
            while end < slots.shape[1] and slots[b, end] == slots[b, end - 1] + 1:
                end += 1
            ends[b, entries + low : entries + at - slots[b, at]] = at
            low = at - slots[b, at]
            slides = at > 0 and slots[b, at] == slots[b, at - 1] and at - groups[count - 1, 1] < most
            if end - at <= room or slides:
                groups[count - 1, 2] = end
                room -= end - at
            else:
                groups[count, 0], groups[count, 1], groups[count, 2], groups[count, 3] = b, at, end, slots[b, at]
                groups[count, 4] = max(slots[b, 0], 0)
                count += 1
                room = most - (slots[b, at] + end - at)
            at = end
        ends[b, entries + low : entries + at] = at
    return count


@inner(fastmath=_CONTRACT)
def _sum_exp(x: Any, count: int, highest: Any) -> Any:
    """Sum of e^(x - highest), which replaces the first `count` x; those up to a multiple of LANES are lost."""
    for i in range(count, -(-count // LANES) * LANES):
        x[i] = -np.inf
    top, sums = splat(highest), splat(np.float32(0))
    for i in range(0, count, LANES):
        power = exp(load(x, i) - top)
        store(x, i, power)
        sums = sums + power
    return total(sums)


@inner(fastmath=_CONTRACT)
def _place(cached: Any, piece: Any, group: Any, key: int, h: int) -> Any:
    """Key or value `key` of a group and head: from the entry cache at first, then from the piece."""
    row, begin, _, before, entries = group
    token = begin + key - before
    return cached[row, entries + token, h] if token < 0 else piece[row, token, h]


@inner(fastmath=_CONTRACT)
def _pack_rows(first: int, last: int, cached: Any, piece: Any, groups: Any, packed: Any) -> None:
    heads, rows = piece.shape[2], packed.shape[1]
    for task in range(first, last):
        item, r = task // rows, task % rows
        copy(_place(cached, piece, groups[item // heads], r, item % heads), packed[item, r])


@compiled(fastmath=_CONTRACT)
def pack(threads: int, cached: Any, piece: Any, groups: Any, packed: Any) -> None:
    """Keys of groups, head by head.

    Args:
        cached, piece: (B, n, H, d) and (B, L, H, d).
        groups: (G, 5), of one shape.
        packed: (G * H, keys of a group, d), out.
    """
    share(_pack_rows, threads, packed.shape[0] * packed.shape[1], (cached, piece, groups, packed))


@inner(fastmath=_CONTRACT)
def _unpack_rows(first: int, last: int, packed: Any, groups: Any, add: bool, cached: Any, piece: Any) -> None:
    heads, rows = piece.shape[2], packed.shape[1]
    for task in range(first, last):
        item, r = task // rows, task % rows
        source, target = packed[item, r], _place(cached, piece, groups[item // heads], r, item % heads)
        if add:
            for i in range(len(target)):
                target[i] = rounded(as_float(target[i]) + as_float(source[i]), piece)
        else:
            copy(source, target)


@compiled(fastmath=_CONTRACT)
def unpack(threads: int, packed: Any, groups: Any, add: bool, cached: Any, piece: Any) -> None:
    """Write what belongs to keys to where they are, or add it there; the inverse of pack.

    Args:
        packed: (G * H, keys of a group, d).
        groups: (G, 5), of one shape; none sees keys of another one.
        cached, piece: (B, n, H, d) and (B, L, H, d), out.
    """
    share(_unpack_rows, threads, packed.shape[0] * packed.shape[1], (packed, groups, add, cached, piece))


@inner(fastmath=_CONTRACT)
def _softmax_rows(first: int, last: int, scores: Any, slots: Any, groups: Any, start: int, sums: Any) -> None:
    items, rows, width = scores.shape
    heads = items // len(groups)
    x = np.empty(width + LANES, np.float32)
    for task in range(first, last):
        item, r = task // rows, task % rows
        row_of, begin, end, before, _ = groups[item // heads]
        row, query = scores[item, r], start + r
        high = before + query + 1
        low = high - 1 - slots[row_of, begin + query]
        highest = np.float32(-np.inf)
        seen = row[low:high]
        for i in range(len(seen)):
            value = as_float(seen[i])
            x[i] = value
            highest = maximum(highest, value)
        power = _sum_exp(x, len(seen), highest)
        scale = np.float32(1) / power
        row[:low] = 0
        for i in range(len(seen)):
            seen[i] = rounded(x[i] * scale, row)
        row[high:] = 0
        to = heads * (row_of * slots.shape[1] + begin) + item % heads * (end - begin)
        sums[to + query] = highest + np.log(power)


@compiled(fastmath=_CONTRACT)
def softmax(threads: int, scores: Any, slots: Any, groups: Any, start: int, sums: Any) -> None:
    """Softmax of a tile of rows in place, 0 where a query sees no key.

    Args:
        scores: (G * H, T, before + start + T): of the queries from `start` of each group.
        slots: (B, L).
        groups: (G, 5), of one shape.
        sums: (B * L * H,) float32, out: logarithms of the sums of the exponentials, (H, n) for each group in turn.
    """
    share(_softmax_rows, threads, scores.shape[0] * scores.shape[1], (scores, slots, groups, start, sums))


@inner(fastmath=_CONTRACT)
def _weigh(scores: Any, grads: Any, i: int, sums: Any, deltas: Any) -> Any:
    """Sixteen scores and gradients of weights to weights and gradients of scores."""
    weight = exp(load(scores, i) - load(sums, i))
    return weight, weight * (load(grads, i) - load(deltas, i))


@inner(fastmath=_CONTRACT)
def _weigh_row(scores: Any, grads: Any, begin: int, end: int, sums: Any, deltas: Any) -> None:
    """In place, from begin to end, which is LANES or more, and maybe some before."""
    last = end - LANES  # taken first, since they may overlap those before
    weights, products = _weigh(scores, grads, last, sums, deltas)
    for i in range(begin, last, LANES):
        weight, product = _weigh(scores, grads, i, sums, deltas)
        store(scores, i, weight)
        store(grads, i, product)
    store(scores, last, weights)
    store(grads, last, products)


@inner(fastmath=_CONTRACT)
def _weigh_narrow(scores: Any, grads: Any, sums: Any, deltas: Any, given: Any, of_queries: Any) -> None:
    """In place, fewer than LANES; the last two are scratch (2, LANES)."""
    copy(scores, given[0])
    copy(grads, given[1])
    copy(sums, of_queries[0])
    copy(deltas, of_queries[1])
    _weigh_row(given[0], given[1], 0, LANES, of_queries[0], of_queries[1])
    copy(given[0, : len(scores)], scores)
    copy(given[1, : len(grads)], grads)


@inner(fastmath=_CONTRACT)
def _gradient_rows(
    first: int,
    last: int,
    scores: Any,
    grads: Any,
    ends: Any,
    length: int,
    groups: Any,
    start: int,
    query: int,
    sums: Any,
    deltas: Any,
) -> None:
    items, rows, width = scores.shape
    heads = items // len(groups)
    given, of_queries = np.zeros((2, LANES), scores.dtype), np.zeros((2, LANES), np.float32)
    for task in range(first, last):
        item, r = task // rows, task % rows
        row_of, begin, end, before, _ = groups[item // heads]
        token = start + r - before
        low = max(token, 0) - query
        high = min(ends[row_of, ends.shape[1] - length + begin + token], end) - begin - query
        row, grad = scores[item, r], grads[item, r]
        own = sums[heads * (row_of * length + begin) + item % heads * (end - begin) + query :]
        if width < LANES:
            _weigh_narrow(row, grad, own[:width], deltas[item, query:], given, of_queries)
        else:
            until = min(-(-high // LANES) * LANES, width)
            _weigh_row(row, grad, low // LANES * LANES, until, own, deltas[item, query:])
        row[:low] = 0
        row[high:] = 0
        grad[:low] = 0
        grad[high:] = 0


@compiled(fastmath=_CONTRACT)
def weight_gradients(
    threads: int,
    scores: Any,
    grads: Any,
    ends: Any,
    length: int,
    groups: Any,
    start: int,
    query: int,
    sums: Any,
    deltas: Any,
) -> None:
    """Scores to weights and gradients of weights to gradients of scores, in place; keys are rows, queries columns.

    Args:
        scores, grads: (G * H, T, n - query): the keys from `start` against the queries from `query` of each group.
        ends: (B, entries + L), the token after the last one that sees an entry of the cache or a token.
        length: L.
        groups: (G, 5), of one shape.
        sums: as from softmax.
        deltas: (G * H, n) float32: products of output and its gradient.
    """
    tasks = scores.shape[0] * scores.shape[1]
    given = (scores, grads, ends, length, groups, start, query, sums, deltas)
    share(_gradient_rows, threads, tasks, given)


@inner(fastmath=_CONTRACT)
def _weighted_sums(
    first: int,
    last: int,
    scores: Any,
    grads: Any,
    ends: Any,
    length: int,
    groups: Any,
    start: int,
    query: int,
    sums: Any,
    deltas: Any,
) -> None:
    items, rows, _ = scores.shape
    heads = items // len(groups)
    totals = np.empty(deltas.shape[1], np.float32)
    for item in range(first, last):
        row, begin, end, before, _ = groups[item // heads]
        own = sums[heads * (row * length + begin) + item % heads * (end - begin) :]
        seen = ends[row, ends.shape[1] - length + begin - before :]  # from the first key of the group on
        low = max(query, seen[start - 1] - begin) if start else query
        high = min(start + rows - before, end - begin)
        for i in range(low, high):
            deltas[item, i] = totals[i] = 0
        for r in range(rows):
            for i in range(max(start + r - before, low), min(seen[start + r] - begin, high)):
                weight = np.exp(as_float(scores[item, r, i - query]) - own[i])
                totals[i] += weight
                deltas[item, i] += weight * as_float(grads[item, r, i - query])
        for i in range(low, high):
            deltas[item, i] /= totals[i]


@compiled(fastmath=_CONTRACT)
def weighted_sums(
    threads: int,
    scores: Any,
    grads: Any,
    ends: Any,
    length: int,
    groups: Any,
    start: int,
    query: int,
    sums: Any,
    deltas: Any,
) -> None:
    """Deltas of the queries that see no key but these: the mean of the weights' gradients, weighted.

    Where these and the scores were rounded to bf16, only so the gradients of a query's scores add up to 0, as output
    times its gradient makes them without rounding. Arguments as in weight_gradients.
    """
    given = (scores, grads, ends, length, groups, start, query, sums, deltas)
    share(_weighted_sums, threads, scores.shape[0], given)


@inner(fastmath=_SUM)
def _dot(a: Any, b: Any) -> Any:
    product = np.float32(0)
    for i in range(len(a)):
        product += as_float(a[i]) * as_float(b[i])
    return product


@inner(fastmath=_CONTRACT)
def _delta_rows(first: int, last: int, grad: Any, out: Any, groups: Any, packed: Any, deltas: Any) -> None:
    heads, n = grad.shape[2], packed.shape[1]
    for task in range(first, last):
        item, i = task // n, task % n
        row, begin, _, _, _ = groups[item // heads]
        source = grad[row, begin + i, item % heads]
        deltas[item, i] = _dot(source, out[row, begin + i, item % heads])
        copy(source, packed[item, i])


@compiled(fastmath=_CONTRACT)
def pack_gradient(threads: int, grad: Any, out: Any, groups: Any, packed: Any, deltas: Any) -> None:
    """Gradient of the output of groups, head by head, and its products with the output.

    Args:
        grad, out: (B, L, H, dv).
        groups: (G, 5), of one shape.
        packed: (G * H, n, dv), out.
        deltas: (G * H, n) float32, out.
    """
    share(_delta_rows, threads, packed.shape[0] * packed.shape[1], (grad, out, groups, packed, deltas))


@inner(fastmath=_CONTRACT)
def _few_scores(
    first: int, last: int, q: Any, k: Any, keys: Any, slots: Any, groups: Any, scores: Any, parts: int
) -> None:
    heads = q.shape[2]
    for task in range(first, last):
        g, h, part = task // parts // heads, task // parts % heads, task % parts
        row, begin, end, before, _ = groups[g]
        for t in range(begin, end):
            high = before + t - begin + 1
            low = high - 1 - slots[row, t]
            for key in range(max(low, part * _PART), min(high, (part + 1) * _PART)):
                scores[g, h, t - begin, key] = _dot(q[row, t, h], _place(keys, k, groups[g], key, h))


@inner(fastmath=_CONTRACT)
def _add_rows(weights: Any, a: Any, b: Any, c: Any, d: Any, target: Any) -> None:
    w, x, y, z = weights[0], weights[1], weights[2], weights[3]
    for i in range(len(target)):
        target[i] += w * as_float(a[i]) + x * as_float(b[i]) + y * as_float(c[i]) + z * as_float(d[i])


@inner(fastmath=_CONTRACT)
def _few_outputs(
    first: int, last: int, v: Any, values: Any, slots: Any, groups: Any, scores: Any, out: Any, sums: Any, size: int
) -> None:
    heads, width = v.shape[2], v.shape[3]
    parts = -(-width // size)
    weights = np.empty(scores.shape[3] + LANES, np.float32)
    mixed = np.empty(size, np.float32)
    for task in range(first, last):
        g, h, part = task // parts // heads, task // parts % heads, task % parts
        group = groups[g]
        row, begin, end, before, _ = group
        left, right = part * size, min(part * size + size, width)
        for t in range(begin, end):
            high = before + t - begin + 1
            low = high - 1 - slots[row, t]
            seen = scores[g, h, t - begin, low:high]
            highest = np.float32(-np.inf)
            for i in range(len(seen)):
                highest = maximum(highest, seen[i])
            copy(seen, weights)
            power = _sum_exp(weights, len(seen), highest)
            mixed[:] = 0
            for key in range(low, high, 4):  # beyond the last key weights are 0, and its value stands in
                a = _place(values, v, group, key, h)[left:right]
                b = _place(values, v, group, min(key + 1, high - 1), h)[left:right]
                c = _place(values, v, group, min(key + 2, high - 1), h)[left:right]
                d = _place(values, v, group, min(key + 3, high - 1), h)[left:right]
                _add_rows(weights[key - low :], a, b, c, d, mixed[: right - left])
            target = out[row, t, h, left:right]
            scale = np.float32(1) / power
            for i in range(len(target)):
                target[i] = rounded(mixed[i] * scale, out)
            if part == 0:
                sums[heads * (row * slots.shape[1] + begin) + h * (end - begin) + t - begin] = highest + np.log(power)


@compiled(fastmath=_CONTRACT)
def attend_few(
    threads: int,
    q: Any,
    k: Any,
    v: Any,
    keys: Any,
    values: Any,
    slots: Any,
    groups: Any,
    scores: Any,
    out: Any,
    sums: Any,
) -> None:
    """Whole attention of groups of few queries, where matrix products would cost more to start than to do.

    Args:
        q, k, v: (B, L, H, d).
        keys, values: (B, n, H, d), the entry cache.
        slots: (B, L).
        groups: (M, 5).
        scores: (M, H, most queries, most keys) float32, scratch.
        out: (B, L, H, dv), out.
        sums: (B * L * H,) float32, out: as from softmax, (H, n) for each group in turn.
    """
    parts = -(-scores.shape[3] // _PART)
    tasks = groups.shape[0] * q.shape[2]
    size = max(_PART, v.shape[3] // 4)
    share(_few_scores, threads, tasks * parts, (q, k, keys, slots, groups, scores, parts))
    share(_few_outputs, threads, tasks * -(-v.shape[3] // size), (v, values, slots, groups, scores, out, sums, size))
