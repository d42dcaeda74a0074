"""CEMA as a recurrence over tokens, in registers: forward, and backward with states recomputed block by block.

A task is one row and WIDTH channels. A block of up to TOKENS tokens is converted to float32 in scratch, then taken
state by state: one of the N states of all channels of the task runs over the tokens of the block, its coefficients and
gradients in registers. Backward starts each block from its saved entry state.
"""

from typing import Any

import numpy as np

from .simd import LANES, compiled, load, splat, store
from .team import share

WIDTH = 2 * LANES
TOKENS = 64
_SIZE = TOKENS * WIDTH
_STEP = 2 * WIDTH  # real parts, then imaginary parts, of one state of a task


@compiled
def plan_blocks(starts: Any, lengths: Any, edges: Any, resets: Any, counts: Any) -> None:
    """Cut each row at document starts and every TOKENS tokens.

    Args:
        starts: (B, L) bool, or (B, 0) for no document.
        lengths: (B,) int64.
        edges: (B, M + 1) int64, out: first token of each block, and the end of the last.
        resets: (B, M) bool, out: whether a document starts with the block.
        counts: (B,) int64, out: blocks of each row.
    """
    packed = starts.shape[1] > 0
    for b in range(len(lengths)):
        at, m = 0, 0
        while at < lengths[b]:
            edges[b, m] = at
            resets[b, m] = packed and starts[b, at]
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


@compiled
def _gather(source: Any, offset: int, dim: int, size: int, width: int, block: Any) -> None:
    """`size` tokens of `width` channels into float32 scratch (TOKENS, WIDTH); zero in missing channels."""
    if width == WIDTH:
        for t in range(size):
            store(block, t * WIDTH, load(source, offset + t * dim))
            store(block, t * WIDTH + LANES, load(source, offset + t * dim + LANES))
        return
    some = np.zeros(WIDTH, source.dtype)
    for t in range(size):
        for w in range(width):
            some[w] = source[offset + t * dim + w]
        store(block, t * WIDTH, load(some, 0))
        store(block, t * WIDTH + LANES, load(some, LANES))


@compiled
def _scatter(block: Any, target: Any, offset: int, dim: int, size: int, width: int) -> None:
    """The inverse of _gather."""
    if width == WIDTH:
        for t in range(size):
            store(target, offset + t * dim, load(block, t * WIDTH))
            store(target, offset + t * dim + LANES, load(block, t * WIDTH + LANES))
        return
    some = np.empty(WIDTH, target.dtype)
    for t in range(size):
        store(some, 0, load(block, t * WIDTH))
        store(some, LANES, load(block, t * WIDTH + LANES))
        for w in range(width):
            target[offset + t * dim + w] = some[w]


@compiled
def _enter(states: Any, source: Any, offset: int, ndim: int, width: int) -> None:
    """(width, N, 2) of a state tensor into scratch (N, 2, WIDTH)."""
    states[:] = 0
    for w in range(width):
        for i in range(2 * ndim):
            states[i * WIDTH + w] = source[offset + w * 2 * ndim + i]


@compiled
def _leave(states: Any, target: Any, offset: int, ndim: int, width: int) -> None:
    """The inverse of _enter."""
    for w in range(width):
        for i in range(2 * ndim):
            target[offset + w * 2 * ndim + i] = states[i * WIDTH + w]


@compiled
def forward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    coefficients: Any,
    omega: Any,
    entry: Any,
    edges: Any,
    resets: Any,
    counts: Any,
    y: Any,
    leaving: Any,
    saved: Any,
) -> None:
    """Tasks first..last of the recurrence; task k is row k // C and channel block k % C. All arrays are flat.

    Args:
        x: (B, L, D) float32 or bf16.
        shape: (L, D, N, M) with M the saved blocks a row; 0 to save none.
        coefficients: (C, N, 5, WIDTH): q real, q imaginary, p, g real, g imaginary; zero beyond D.
        omega: (C, WIDTH).
        entry: (B, D, N, 2).
        edges, resets, counts: of plan_blocks.
        y: as x, out.
        leaving: (B, D, N, 2), out.
        saved: (B, C, M, N, 2, WIDTH), out: state at the entry of each block.
    """
    length, dim, ndim, kept = shape
    blocks = len(omega) // WIDTH
    xs = np.empty(_SIZE, np.float32)
    ys = np.empty(_SIZE, np.float32)
    states = np.empty(ndim * _STEP, np.float32)
    for task in range(first, last):
        b, c = task // blocks, task % blocks
        width = min(WIDTH, dim - c * WIDTH)
        state_at = (b * dim + c * WIDTH) * 2 * ndim
        _enter(states, entry, state_at, ndim, width)
        for m in range(counts[b]):
            at = edges[b, m]
            size = edges[b, m + 1] - at
            if resets[b, m]:
                states[:] = 0
            if kept > 0:
                to = (task * kept + m) * ndim * _STEP
                saved[to : to + ndim * _STEP] = states
            offset = (b * length + at) * dim + c * WIDTH
            _gather(x, offset, dim, size, width, xs)
            for i in range(0, size * WIDTH, WIDTH):
                store(ys, i, load(omega, c * WIDTH) * load(xs, i))
                store(ys, i + LANES, load(omega, c * WIDTH + LANES) * load(xs, i + LANES))
            for n in range(ndim):
                k, h = (c * ndim + n) * 5 * WIDTH, n * _STEP
                qr0, qr1 = load(coefficients, k), load(coefficients, k + LANES)
                qi0, qi1 = load(coefficients, k + WIDTH), load(coefficients, k + WIDTH + LANES)
                p0, p1 = load(coefficients, k + 2 * WIDTH), load(coefficients, k + 2 * WIDTH + LANES)
                gr0, gr1 = load(coefficients, k + 3 * WIDTH), load(coefficients, k + 3 * WIDTH + LANES)
                gi0, gi1 = load(coefficients, k + 4 * WIDTH), load(coefficients, k + 4 * WIDTH + LANES)
                r0, r1 = load(states, h), load(states, h + LANES)
                i0, i1 = load(states, h + WIDTH), load(states, h + WIDTH + LANES)
                for i in range(0, size * WIDTH, WIDTH):
                    next0 = qr0 * r0 - qi0 * i0 + p0 * load(xs, i)
                    next1 = qr1 * r1 - qi1 * i1 + p1 * load(xs, i + LANES)
                    i0 = qr0 * i0 + qi0 * r0
                    i1 = qr1 * i1 + qi1 * r1
                    r0, r1 = next0, next1
                    store(ys, i, load(ys, i) + gr0 * r0 - gi0 * i0)
                    store(ys, i + LANES, load(ys, i + LANES) + gr1 * r1 - gi1 * i1)
                store(states, h, r0)
                store(states, h + LANES, r1)
                store(states, h + WIDTH, i0)
                store(states, h + WIDTH + LANES, i1)
            _scatter(ys, y, offset, dim, size, width)
        _leave(states, leaving, state_at, ndim, width)


@compiled
def backward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    coefficients: Any,
    omega: Any,
    saved: Any,
    edges: Any,
    resets: Any,
    counts: Any,
    grad_y: Any,
    grad_leaving: Any,
    grad_x: Any,
    grad_coefficients: Any,
    grad_omega: Any,
    grad_entry: Any,
) -> None:
    """Tasks first..last of the adjoint recurrence, from the last token to the first. All arrays are flat.

    With a = dL/dh: a_t = conj(g) dy_t + conj(q) a_{t+1}; dx = sum_n p Re(a) + omega dy; dp = sum_t Re(a) x;
    dq = sum_t a_t conj(h_{t-1}); dg = sum_t dy_t conj(h_t).

    Args:
        grad_y: as x; grad_leaving: (B, D, N, 2).
        grad_x: as x; grad_coefficients: (B, C, N, 5, WIDTH), grad_omega: (B, C, WIDTH), grad_entry: (B, D, N, 2); out.
    """
    length, dim, ndim, kept = shape
    blocks = len(omega) // WIDTH
    xs = np.empty(_SIZE, np.float32)
    dy = np.empty(_SIZE, np.float32)
    dx = np.empty(_SIZE, np.float32)
    hr = np.empty((TOKENS + 1) * LANES, np.float32)  # before the first token, then after each
    hi = np.empty((TOKENS + 1) * LANES, np.float32)
    adjoint = np.empty(ndim * _STEP, np.float32)
    zero = splat(np.float32(0))
    for task in range(first, last):
        b, c = task // blocks, task % blocks
        width = min(WIDTH, dim - c * WIDTH)
        state_at = (b * dim + c * WIDTH) * 2 * ndim
        _enter(adjoint, grad_leaving, state_at, ndim, width)
        grad_coefficients[task * ndim * 5 * WIDTH : (task + 1) * ndim * 5 * WIDTH] = 0
        grad_omega[task * WIDTH : (task + 1) * WIDTH] = 0
        for m in range(counts[b] - 1, -1, -1):
            at = edges[b, m]
            size = edges[b, m + 1] - at
            offset = (b * length + at) * dim + c * WIDTH
            _gather(x, offset, dim, size, width, xs)
            _gather(grad_y, offset, dim, size, width, dy)
            for half in range(0, WIDTH, LANES):
                direct, grad_direct = load(omega, c * WIDTH + half), load(grad_omega, task * WIDTH + half)
                for i in range(half, size * WIDTH + half, WIDTH):
                    store(dx, i, direct * load(dy, i))
                    grad_direct = grad_direct + load(xs, i) * load(dy, i)
                store(grad_omega, task * WIDTH + half, grad_direct)
                for n in range(ndim):
                    k = (c * ndim + n) * 5 * WIDTH + half
                    qr, qi = load(coefficients, k), load(coefficients, k + WIDTH)
                    p = load(coefficients, k + 2 * WIDTH)
                    gr, gi = load(coefficients, k + 3 * WIDTH), load(coefficients, k + 4 * WIDTH)
                    h = ((task * kept + m) * ndim + n) * _STEP + half
                    r, i_ = load(saved, h), load(saved, h + WIDTH)
                    store(hr, 0, r)
                    store(hi, 0, i_)
                    for t in range(size):
                        following = qr * r - qi * i_ + p * load(xs, t * WIDTH + half)
                        i_ = qr * i_ + qi * r
                        r = following
                        store(hr, (t + 1) * LANES, r)
                        store(hi, (t + 1) * LANES, i_)
                    ar, ai = load(adjoint, n * _STEP + half), load(adjoint, n * _STEP + WIDTH + half)
                    dqr, dqi, dp, dgr, dgi = zero, zero, zero, zero, zero
                    for t in range(size - 1, -1, -1):
                        i = t * WIDTH + half
                        grad = load(dy, i)
                        dgr = dgr + grad * r
                        dgi = dgi - grad * i_
                        ar = ar + gr * grad
                        ai = ai - gi * grad
                        store(dx, i, load(dx, i) + p * ar)
                        dp = dp + ar * load(xs, i)
                        r, i_ = load(hr, t * LANES), load(hi, t * LANES)
                        dqr = dqr + ar * r + ai * i_
                        dqi = dqi + ai * r - ar * i_
                        following = qr * ar + qi * ai
                        ai = qr * ai - qi * ar
                        ar = following
                    store(adjoint, n * _STEP + half, ar)
                    store(adjoint, n * _STEP + WIDTH + half, ai)
                    g = (task * ndim + n) * 5 * WIDTH + half
                    store(grad_coefficients, g, load(grad_coefficients, g) + dqr)
                    store(grad_coefficients, g + WIDTH, load(grad_coefficients, g + WIDTH) + dqi)
                    store(grad_coefficients, g + 2 * WIDTH, load(grad_coefficients, g + 2 * WIDTH) + dp)
                    store(grad_coefficients, g + 3 * WIDTH, load(grad_coefficients, g + 3 * WIDTH) + dgr)
                    store(grad_coefficients, g + 4 * WIDTH, load(grad_coefficients, g + 4 * WIDTH) + dgi)
            if resets[b, m]:
                adjoint[:] = 0
            _scatter(dx, grad_x, offset, dim, size, width)
        _leave(adjoint, grad_entry, state_at, ndim, width)


@compiled
def forward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """forward for all tasks."""
    share(forward, threads, num_tasks, args)


@compiled
def backward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """backward for all tasks."""
    share(backward, threads, num_tasks, args)
