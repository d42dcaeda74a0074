"""The selective scan as a recurrence over tokens, in registers: forward, and backward with states recomputed.

As CEMA's kernels: sixteen channels side by side, two states at a time over the tokens of a strip. What all channels
share, b and c, is one number for all of them; its gradient is a sum over them, left to be finished outside for each
task of CHANNELS channels. Backward keeps the decays and states of one strip and two states in scratch.
"""

from typing import Any

import numpy as np

from .scalars import as_float
from .simd import LANES, add_product, compiled, exp, inner, load, splat, store
from .strips import CHANNELS, TOKENS, clear, enter, gather, leave, scatter
from .team import share
from .totals import totals


@inner
def _gather_shared(source: Any, offset: int, size: int, ndim: int, even: int, strip: Any) -> None:
    """b or c of `size` tokens into float32 scratch (TOKENS, N'), zero beyond N."""
    for t in range(size):
        for n in range(ndim):
            strip[t * even + n] = as_float(source[offset + t * ndim + n])
        for n in range(ndim, even):
            strip[t * even + n] = 0


@inner
def _multiply(a: Any, b: Any, size: int, product: Any) -> None:
    for i in range(0, size * CHANNELS, LANES):
        store(product, i, load(a, i) * load(b, i))


@inner
def _forward(
    first: int,
    last: int,
    x: Any,
    dt: Any,
    shape: Any,
    rates: Any,
    b: Any,
    c: Any,
    skip: Any,
    entry: Any,
    edges: Any,
    slots: Any,
    counts: Any,
    y: Any,
    leaving: Any,
    saved: Any,
) -> None:
    length, dim, ndim, kept = shape
    parts = len(skip) // CHANNELS
    even = ndim + ndim % 2
    xs = np.empty(TOKENS * CHANNELS, np.float32)
    dts = np.empty(TOKENS * CHANNELS, np.float32)
    us = np.empty(TOKENS * CHANNELS, np.float32)
    ys = np.empty(TOKENS * CHANNELS, np.float32)
    bs = np.empty(TOKENS * even, np.float32)
    cs = np.empty(TOKENS * even, np.float32)
    states = np.empty(even * CHANNELS, np.float32)
    for task in range(first, last):
        row, part = task // parts, task % parts
        width = min(CHANNELS, dim - part * CHANNELS)
        state_at = (row * dim + part * CHANNELS) * ndim
        enter(states, entry, state_at, ndim, width)
        for m in range(counts[row]):
            t0, slot = edges[row, m], slots[row, m]
            size = edges[row, m + 1] - t0
            if slot < 0:
                clear(states, 0, even * CHANNELS)
            elif kept > 0:
                to = (task * kept + slot) * even * CHANNELS
                for i in range(even * CHANNELS):
                    saved[to + i] = states[i]
            offset = (row * length + t0) * dim + part * CHANNELS
            gather(x, offset, dim, size, width, xs)
            gather(dt, offset, dim, size, width, dts)
            _gather_shared(b, (row * length + t0) * ndim, size, ndim, even, bs)
            _gather_shared(c, (row * length + t0) * ndim, size, ndim, even, cs)
            _multiply(xs, dts, size, us)
            for half in range(0, width, LANES):
                direct = load(skip, part * CHANNELS + half)
                for i in range(half, size * CHANNELS, CHANNELS):
                    store(ys, i, direct * load(xs, i))
                for n in range(0, even, 2):
                    k = (part * even + n) * CHANNELS + half
                    a0, a1 = load(rates, k), load(rates, k + CHANNELS)
                    at = n * CHANNELS + half
                    h0, h1 = load(states, at), load(states, at + CHANNELS)
                    for t in range(size):
                        i, j = t * CHANNELS + half, t * even + n
                        u, d = load(us, i), load(dts, i)
                        h0 = add_product(u * splat(bs[j]), exp(d * a0), h0)
                        h1 = add_product(u * splat(bs[j + 1]), exp(d * a1), h1)
                        partial = add_product(load(ys, i), splat(cs[j]), h0)
                        store(ys, i, add_product(partial, splat(cs[j + 1]), h1))
                    store(states, at, h0)
                    store(states, at + CHANNELS, h1)
            scatter(ys, y, offset, dim, size, width)
        leave(states, leaving, state_at, ndim, width)


@inner
def _add_totals(scratch: Any, count: int, target: Any, at: int) -> None:
    """Totals over channels of up to sixteen tokens, added where a task keeps those of its channels."""
    found = totals(scratch, 0)
    if count == LANES:
        store(target, at, load(target, at) + found)
        return
    store(scratch, 0, found)
    for t in range(count):
        target[at + t] += scratch[t]


@inner
def _backward(
    first: int,
    last: int,
    x: Any,
    dt: Any,
    shape: Any,
    rates: Any,
    b: Any,
    c: Any,
    skip: Any,
    saved: Any,
    edges: Any,
    slots: Any,
    counts: Any,
    grad_y: Any,
    grad_leaving: Any,
    grad_x: Any,
    grad_dt: Any,
    grad_rates: Any,
    grad_b: Any,
    grad_c: Any,
    grad_skip: Any,
    grad_entry: Any,
) -> None:
    length, dim, ndim, kept = shape
    parts = len(skip) // CHANNELS
    even = ndim + ndim % 2
    xs = np.empty(TOKENS * CHANNELS, np.float32)
    dts = np.empty(TOKENS * CHANNELS, np.float32)
    us = np.empty(TOKENS * CHANNELS, np.float32)
    dy = np.empty(TOKENS * CHANNELS, np.float32)
    du = np.empty(TOKENS * CHANNELS, np.float32)
    ddt = np.empty(TOKENS * CHANNELS, np.float32)
    bs = np.empty(TOKENS * even, np.float32)
    cs = np.empty(TOKENS * even, np.float32)
    past = np.empty((TOKENS + 1) * 2 * LANES, np.float32)  # two states before each token of the strip, and after it
    decays = np.empty(TOKENS * 2 * LANES, np.float32)
    to_b0 = np.zeros(LANES * LANES, np.float32)  # of sixteen tokens, what each channel gives to the gradient of b
    to_b1 = np.zeros(LANES * LANES, np.float32)
    to_c0 = np.zeros(LANES * LANES, np.float32)
    to_c1 = np.zeros(LANES * LANES, np.float32)
    later = np.empty(even * CHANNELS, np.float32)  # what comes to the gradient of each state from later tokens
    zero = splat(np.float32(0))
    for task in range(first, last):
        row, part = task // parts, task % parts
        width = min(CHANNELS, dim - part * CHANNELS)
        state_at = (row * dim + part * CHANNELS) * ndim
        enter(later, grad_leaving, state_at, ndim, width)
        clear(grad_rates, task * even * CHANNELS, even * CHANNELS)
        clear(grad_skip, task * CHANNELS, CHANNELS)
        for m in range(counts[row] - 1, -1, -1):
            t0, slot = edges[row, m], slots[row, m]
            size = edges[row, m + 1] - t0
            offset = (row * length + t0) * dim + part * CHANNELS
            gather(x, offset, dim, size, width, xs)
            gather(dt, offset, dim, size, width, dts)
            gather(grad_y, offset, dim, size, width, dy)
            _gather_shared(b, (row * length + t0) * ndim, size, ndim, even, bs)
            _gather_shared(c, (row * length + t0) * ndim, size, ndim, even, cs)
            _multiply(xs, dts, size, us)
            for half in range(0, width, LANES):
                grad_direct = load(grad_skip, task * CHANNELS + half)
                for i in range(half, size * CHANNELS, CHANNELS):
                    store(du, i, zero)
                    store(ddt, i, zero)
                    grad_direct = add_product(grad_direct, load(xs, i), load(dy, i))
                store(grad_skip, task * CHANNELS + half, grad_direct)
                for n in range(0, even, 2):
                    k = (part * even + n) * CHANNELS + half
                    a0, a1 = load(rates, k), load(rates, k + CHANNELS)
                    h0, h1 = zero, zero
                    if slot >= 0:
                        at = ((task * kept + slot) * even + n) * CHANNELS + half
                        h0, h1 = load(saved, at), load(saved, at + CHANNELS)
                    store(past, 0, h0)
                    store(past, LANES, h1)
                    for t in range(size):
                        i, j, p = t * CHANNELS + half, t * even + n, t * 2 * LANES
                        u, d = load(us, i), load(dts, i)
                        e0, e1 = exp(d * a0), exp(d * a1)
                        h0 = add_product(u * splat(bs[j]), e0, h0)
                        h1 = add_product(u * splat(bs[j + 1]), e1, h1)
                        store(decays, p, e0)
                        store(decays, p + LANES, e1)
                        store(past, p + 2 * LANES, h0)
                        store(past, p + 3 * LANES, h1)
                    at = n * CHANNELS + half
                    later0, later1 = load(later, at), load(later, at + CHANNELS)
                    to = (task * even + n) * CHANNELS + half
                    da0, da1 = load(grad_rates, to), load(grad_rates, to + CHANNELS)
                    end = size
                    while end > 0:
                        begin = (end - 1) // LANES * LANES
                        for t in range(end - 1, begin - 1, -1):
                            i, j, p, s = t * CHANNELS + half, t * even + n, t * 2 * LANES, (t - begin) * LANES
                            grad, u, d = load(dy, i), load(us, i), load(dts, i)
                            store(to_c0, s, grad * load(past, p + 2 * LANES))
                            store(to_c1, s, grad * load(past, p + 3 * LANES))
                            dh0 = add_product(later0, splat(cs[j]), grad)
                            dh1 = add_product(later1, splat(cs[j + 1]), grad)
                            store(to_b0, s, dh0 * u)
                            store(to_b1, s, dh1 * u)
                            partial = add_product(load(du, i), splat(bs[j]), dh0)
                            store(du, i, add_product(partial, splat(bs[j + 1]), dh1))
                            later0, later1 = dh0 * load(decays, p), dh1 * load(decays, p + LANES)
                            w0, w1 = later0 * load(past, p), later1 * load(past, p + LANES)
                            store(ddt, i, add_product(add_product(load(ddt, i), a0, w0), a1, w1))
                            da0, da1 = add_product(da0, d, w0), add_product(da1, d, w1)
                        count = end - begin
                        shared = (task * even + n) * length + t0 + begin
                        _add_totals(to_b0, count, grad_b, shared)
                        _add_totals(to_b1, count, grad_b, shared + length)
                        _add_totals(to_c0, count, grad_c, shared)
                        _add_totals(to_c1, count, grad_c, shared + length)
                        end = begin
                    store(later, at, later0)
                    store(later, at + CHANNELS, later1)
                    store(grad_rates, to, da0)
                    store(grad_rates, to + CHANNELS, da1)
                direct = load(skip, part * CHANNELS + half)
                for i in range(half, size * CHANNELS, CHANNELS):
                    store(ddt, i, add_product(load(ddt, i), load(xs, i), load(du, i)))
                    store(du, i, add_product(direct * load(dy, i), load(dts, i), load(du, i)))
            scatter(du, grad_x, offset, dim, size, width)
            scatter(ddt, grad_dt, offset, dim, size, width)
            if slot < 0:
                clear(later, 0, even * CHANNELS)
        leave(later, grad_entry, state_at, ndim, width)


@compiled
def forward(threads: int, num_tasks: int, args: Any) -> None:
    """The recurrence over B x C tasks, C = ceil(D / CHANNELS).

    Args:
        threads, num_tasks: see team.share.
        args: tuple of
            x: (B, L, D) float32 or bf16.
            dt: (B, L, D) float32.
            shape: (L, D, N, K) with K the saved states a row; 0 to save none.
            rates: (C, N', CHANNELS), a; zero beyond D, and N' is N made even with zeros.
            b, c: (B, L, N), each float32 or bf16.
            skip: (C, CHANNELS).
            entry: (B, D, N).
            edges, slots, counts: of plan_strips.
            y: as x, out; padding is not touched.
            leaving: (B, D, N), out.
            saved: (B, C, K, N', CHANNELS), out: state at the entry of the strips that have a slot.
    """
    share(_forward, threads, num_tasks, args)


@compiled
def backward(threads: int, num_tasks: int, args: Any) -> None:
    """The adjoint recurrence, from the last token to the first.

    With s = dL/dh, e = exp(dt a) and u = dt x: s_t = c dy_t + e_{t+1} s_{t+1}; du = sum_n b s; dc = h dy and db = s u,
    each summed over channels; w = s_t e_t h_{t-1}; da = sum_t w dt; ddt = sum_n w a + x du; dx = dt du + skip dy.

    Args:
        threads, num_tasks: see team.share.
        args: tuple of x, dt, shape, rates, b, c, skip, saved, edges, slots and counts as above,
            grad_y: as x.
            grad_leaving: (B, D, N).
            grad_x, grad_dt: as x and dt, out; padding is not touched.
            grad_rates: (B, C, N', CHANNELS), out.
            grad_b, grad_c: (B, C, N', L), added to: zeros, or what padding shall have.
            grad_skip: (B, C, CHANNELS), out.
            grad_entry: (B, D, N), out.
    """
    share(_backward, threads, num_tasks, args)
