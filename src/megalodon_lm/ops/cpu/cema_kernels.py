"""CEMA as a recurrence over tokens, in registers: forward, and backward with states recomputed strip by strip.

A strip is taken two states at a time: they run over its tokens together, coefficients and gradients in registers. One
alone would wait for its own last product: in the sums below, what comes from the token before is added last. Backward
starts each strip from its saved entry state, or from zero where a document starts.
"""

from typing import Any

import numpy as np

from .cema_strips import COEFFICIENTS, STEP, load_coefficients, load_pair, store_pair
from .simd import LANES, add_product, compiled, inner, load, splat, store, sub_product
from .strips import CHANNELS, TOKENS, clear, enter, gather, leave, scatter
from .team import share


@inner
def _advance(c: Any, h: Any, x: Any) -> Any:
    """q h + p x."""
    qr, qi, p, _, _ = c
    return add_product(sub_product(p * x, qi, h[1]), qr, h[0]), add_product(qi * h[0], qr, h[1])


@inner
def _emit(c: Any, h: Any, y: Any) -> Any:
    """y + Re(g h)."""
    return sub_product(add_product(y, c[3], h[0]), c[4], h[1])


@inner
def _receive(c: Any, later: Any, dy: Any) -> Any:
    """The adjoint of a state: what comes from later tokens, and conj(g) dy."""
    return add_product(later[0], c[3], dy), sub_product(later[1], c[4], dy)


@inner
def _retreat(c: Any, a: Any) -> Any:
    """conj(q) a."""
    qr, qi, _, _, _ = c
    return add_product(qi * a[1], qr, a[0]), sub_product(qr * a[1], qi, a[0])


@inner
def _add_conjugate(total: Any, a: Any, h: Any) -> Any:
    """total + a conj(h)."""
    real, imag = total
    real = add_product(add_product(real, a[0], h[0]), a[1], h[1])
    return real, sub_product(add_product(imag, a[1], h[0]), a[0], h[1])


@inner
def _accumulate(target: Any, at: int, dq: Any, dp: Any, dg: Any) -> None:
    for i, value in enumerate((dq[0], dq[1], dp, dg[0], dg[1])):
        store(target, at + i * CHANNELS, load(target, at + i * CHANNELS) + value)


@inner
def _forward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    coefficients: Any,
    omega: Any,
    entry: Any,
    edges: Any,
    slots: Any,
    counts: Any,
    y: Any,
    leaving: Any,
    saved: Any,
) -> None:
    length, dim, ndim, kept = shape
    parts = len(omega) // CHANNELS
    even = ndim + ndim % 2
    xs = np.empty(TOKENS * CHANNELS, np.float32)
    ys = np.empty(TOKENS * CHANNELS, np.float32)
    states = np.empty(even * STEP, np.float32)
    for task in range(first, last):
        b, c = task // parts, task % parts
        width = min(CHANNELS, dim - c * CHANNELS)
        state_at = (b * dim + c * CHANNELS) * 2 * ndim
        enter(states, entry, state_at, 2 * ndim, width)
        for m in range(counts[b]):
            t0, slot = edges[b, m], slots[b, m]
            size = edges[b, m + 1] - t0
            if slot < 0:
                clear(states, 0, even * STEP)
            elif kept > 0:
                to = (task * kept + slot) * even * STEP
                for i in range(even * STEP):
                    saved[to + i] = states[i]
            offset = (b * length + t0) * dim + c * CHANNELS
            gather(x, offset, dim, size, width, xs)
            for half in range(0, CHANNELS, LANES):
                direct = load(omega, c * CHANNELS + half)
                for i in range(half, size * CHANNELS, CHANNELS):
                    store(ys, i, direct * load(xs, i))
                for n in range(0, even, 2):
                    k = (c * even + n) * COEFFICIENTS + half
                    c0, c1 = load_coefficients(coefficients, k), load_coefficients(coefficients, k + COEFFICIENTS)
                    at = n * STEP + half
                    h0, h1 = load_pair(states, at), load_pair(states, at + STEP)
                    for i in range(half, size * CHANNELS, CHANNELS):
                        u = load(xs, i)
                        h0, h1 = _advance(c0, h0, u), _advance(c1, h1, u)
                        store(ys, i, _emit(c1, h1, _emit(c0, h0, load(ys, i))))
                    store_pair(states, at, h0)
                    store_pair(states, at + STEP, h1)
            scatter(ys, y, offset, dim, size, width)
        leave(states, leaving, state_at, 2 * ndim, width)


@inner
def _backward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    coefficients: Any,
    omega: Any,
    saved: Any,
    edges: Any,
    slots: Any,
    counts: Any,
    grad_y: Any,
    grad_leaving: Any,
    grad_x: Any,
    grad_coefficients: Any,
    grad_omega: Any,
    grad_entry: Any,
) -> None:
    length, dim, ndim, kept = shape
    parts = len(omega) // CHANNELS
    even = ndim + ndim % 2
    xs = np.empty(TOKENS * CHANNELS, np.float32)
    dy = np.empty(TOKENS * CHANNELS, np.float32)
    dx = np.empty(TOKENS * CHANNELS, np.float32)
    past = np.empty(TOKENS * 2 * STEP, np.float32)  # two states before each token of the strip
    later = np.empty(even * STEP, np.float32)  # what comes to the adjoint of each state from later tokens
    zero = splat(np.float32(0))
    for task in range(first, last):
        b, c = task // parts, task % parts
        width = min(CHANNELS, dim - c * CHANNELS)
        state_at = (b * dim + c * CHANNELS) * 2 * ndim
        enter(later, grad_leaving, state_at, 2 * ndim, width)
        clear(grad_coefficients, task * even * COEFFICIENTS, even * COEFFICIENTS)
        clear(grad_omega, task * CHANNELS, CHANNELS)
        for m in range(counts[b] - 1, -1, -1):
            t0, slot = edges[b, m], slots[b, m]
            size = edges[b, m + 1] - t0
            offset = (b * length + t0) * dim + c * CHANNELS
            gather(x, offset, dim, size, width, xs)
            gather(grad_y, offset, dim, size, width, dy)
            for half in range(0, CHANNELS, LANES):
                direct, grad_direct = load(omega, c * CHANNELS + half), load(grad_omega, task * CHANNELS + half)
                for i in range(half, size * CHANNELS, CHANNELS):
                    store(dx, i, direct * load(dy, i))
                    grad_direct = add_product(grad_direct, load(xs, i), load(dy, i))
                store(grad_omega, task * CHANNELS + half, grad_direct)
                for n in range(0, even, 2):
                    k = (c * even + n) * COEFFICIENTS + half
                    c0, c1 = load_coefficients(coefficients, k), load_coefficients(coefficients, k + COEFFICIENTS)
                    h0, h1 = (zero, zero), (zero, zero)
                    if slot >= 0:
                        at = ((task * kept + slot) * even + n) * STEP + half
                        h0, h1 = load_pair(saved, at), load_pair(saved, at + STEP)
                    dg0, dg1 = (zero, zero), (zero, zero)
                    for t in range(size):
                        i = t * CHANNELS + half
                        store_pair(past, t * 2 * STEP, h0)
                        store_pair(past, t * 2 * STEP + STEP, h1)
                        h0, h1 = _advance(c0, h0, load(xs, i)), _advance(c1, h1, load(xs, i))
                        grad = (load(dy, i), zero)
                        dg0, dg1 = _add_conjugate(dg0, grad, h0), _add_conjugate(dg1, grad, h1)
                    at = n * STEP + half
                    later0, later1 = load_pair(later, at), load_pair(later, at + STEP)
                    dq0, dq1, dp0, dp1 = (zero, zero), (zero, zero), zero, zero
                    for t in range(size - 1, -1, -1):
                        i = t * CHANNELS + half
                        a0, a1 = _receive(c0, later0, load(dy, i)), _receive(c1, later1, load(dy, i))
                        later0, later1 = _retreat(c0, a0), _retreat(c1, a1)
                        store(dx, i, add_product(add_product(load(dx, i), c0[2], a0[0]), c1[2], a1[0]))
                        dp0, dp1 = add_product(dp0, a0[0], load(xs, i)), add_product(dp1, a1[0], load(xs, i))
                        dq0 = _add_conjugate(dq0, a0, load_pair(past, t * 2 * STEP))
                        dq1 = _add_conjugate(dq1, a1, load_pair(past, t * 2 * STEP + STEP))
                    store_pair(later, at, later0)
                    store_pair(later, at + STEP, later1)
                    to = (task * even + n) * COEFFICIENTS + half
                    _accumulate(grad_coefficients, to, dq0, dp0, dg0)
                    _accumulate(grad_coefficients, to + COEFFICIENTS, dq1, dp1, dg1)
            if slot < 0:
                clear(later, 0, even * STEP)
            scatter(dx, grad_x, offset, dim, size, width)
        leave(later, grad_entry, state_at, 2 * ndim, width)


@compiled
def forward(threads: int, num_tasks: int, args: Any) -> None:
    """The recurrence; task k is row k // C and the channels of part k % C.

    Args:
        threads, num_tasks: see team.share.
        args: tuple of
            x: (B, L, D) float32 or bf16.
            shape: (L, D, N, K) with K the saved states a row; 0 to save none.
            coefficients: (C, N', 5, CHANNELS): q real, q imaginary, p, g real, g imaginary; zero beyond D, and N' is N
                made even with zeros.
            omega: (C, CHANNELS).
            entry: (B, D, N, 2).
            edges, slots, counts: of plan_strips.
            y: as x, out; padding is not touched.
            leaving: (B, D, N, 2), out.
            saved: (B, C, K, N', 2, CHANNELS), out: state at the entry of the strips that have a slot.
    """
    share(_forward, threads, num_tasks, args)


@compiled
def backward(threads: int, num_tasks: int, args: Any) -> None:
    """The adjoint recurrence, from the last token to the first.

    With a = dL/dh: a_t = conj(g) dy_t + conj(q) a_{t+1}; dx = sum_n p Re(a) + omega dy; dp = sum_t Re(a) x;
    dq = sum_t a_t conj(h_{t-1}); dg = sum_t dy_t conj(h_t).

    Args:
        threads, num_tasks: see team.share.
        args: tuple of x, shape, coefficients, omega, saved, edges, slots and counts as above,
            grad_y: as x.
            grad_leaving: (B, D, N, 2).
            grad_x: as x, out; padding is not touched.
            grad_coefficients: (B, C, N', 5, CHANNELS), out.
            grad_omega: (B, C, CHANNELS), out.
            grad_entry: (B, D, N, 2), out.
    """
    share(_backward, threads, num_tasks, args)
