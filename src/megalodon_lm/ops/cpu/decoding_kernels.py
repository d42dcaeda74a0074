"""One token through one layer, or through the head, as one compiled call without gradients.

The state is changed in place and nothing is allocated. Activations are float32; weights and the attention cache are
float32 or bf16. All arrays are flat. Widths are multiples of 16.
"""

from typing import Any

import numpy as np

from . import scalars
from .elementwise_kernels import gate_forward_on_team, norm_forward_on_team
from .matrix_vector import products
from .simd import LANES, add_product, compiled, exp, inner, load, sigmoid, splat, store, sub_product, total
from .team import share
from .timestep_norm_kernels import forward_on_team as timestep_norm

SPLIT = 128  # keys in one task of attention
_FEW = 1 << 14  # operations that are not worth waking another thread for


@inner
def _moving_average(
    first: int, last: int, x: Any, dim: int, ndim: int, p: Any, q: Any, g: Any, omega: Any, h: Any, y: Any
) -> None:
    """Channels first..last of (B, D). q, g: (D, 2, N) and h: (B, D, 2, N): all real parts, then all imaginary ones."""
    for task in range(first, last):
        channel = task % dim
        u = x[task]
        source = splat(u)
        sums = splat(np.float32(0))
        for n in range(0, ndim, LANES):
            at, to = 2 * ndim * channel + n, 2 * ndim * task + n
            q_real, q_imag, real, imag = load(q, at), load(q, at + ndim), load(h, to), load(h, to + ndim)
            new = add_product(load(p, ndim * channel + n) * source, q_real, real)
            new = sub_product(new, q_imag, imag)
            imag = add_product(q_real * imag, q_imag, real)
            store(h, to, new)
            store(h, to + ndim, imag)
            sums = sub_product(add_product(sums, load(g, at), new), load(g, at + ndim), imag)
        y[task] = total(sums) + omega[channel] * u


@inner
def _silu(x: Any, at: int, y: Any, to: int, size: int) -> None:
    for i in range(0, size, LANES):
        some = load(x, at + i)
        store(y, to + i, some * sigmoid(some))


@inner
def _enter_cache(
    first: int,
    last: int,
    z: Any,
    v: Any,
    gamma: Any,
    beta: Any,
    cos: Any,
    sin: Any,
    shape: Any,
    eps: float,
    fill: Any,
    q: Any,
    keys: Any,
    values: Any,
) -> None:
    """Rows first..last: normalise z per head, make and rotate the query and the key, and store key and value."""
    size, heads, dk, dv = shape
    for b in range(first, last):
        slot = fill[b]
        for h in range(heads):
            at = (b * heads + h) * dk
            square = np.float32(0)
            for i in range(dk):
                square += z[at + i] * z[at + i]
            scale = np.float32(1 / np.sqrt(square / np.float32(dk) + np.float32(eps)))
            to = ((b * size + slot) * heads + h) * dk
            for i in range(0, dk, 2):
                c, s = cos[slot * dk // 2 + i // 2], sin[slot * dk // 2 + i // 2]
                even, odd = z[at + i] * scale, z[at + i + 1] * scale
                w = h * dk + i
                a, o = even * gamma[w] + beta[w], odd * gamma[w + 1] + beta[w + 1]
                q[at + i], q[at + i + 1] = a * c - o * s, a * s + o * c
                w += heads * dk
                a, o = even * gamma[w] + beta[w], odd * gamma[w + 1] + beta[w + 1]
                keys[to + i] = scalars.rounded(a * c - o * s, keys)
                keys[to + i + 1] = scalars.rounded(a * s + o * c, keys)
        _silu(v, b * heads * dv, values, (b * size + slot) * heads * dv, heads * dv)


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
def _attend(
    first: int,
    last: int,
    splits: int,
    q: Any,
    keys: Any,
    values: Any,
    fill: Any,
    shape: Any,
    scores: Any,
    summary: Any,
    partial: Any,
) -> None:
    """Tasks first..last of (B, splits): softmax attention to SPLIT keys, not yet divided by its sum of weights.

    The heads go together, so that keys and values are read in the order in which they lie.

    Args:
        scores: (tasks, H, SPLIT), scratch.
        summary: (tasks, H, 2), out: highest score and sum of weights.
        partial: (tasks, H, dv), out.
    """
    size, heads, dk, dv = shape
    zero = splat(np.float32(0))
    for task in range(first, last):
        b, begin = task // splits, task % splits * SPLIT
        count = min(SPLIT, fill[b] + 1 - begin)
        mine = task * heads * SPLIT
        key = (b * size + begin) * heads * dk
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
        value = (b * size + begin) * row
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
def _combine(
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


@inner
def _add(a: Any, b: Any, y: Any) -> None:
    """y += a + b."""
    for i in range(0, len(y), LANES):
        store(y, i, load(y, i) + (load(a, i) + load(b, i)))


@compiled
def layer(threads: int, sizes: Any, eps: float, x: Any, room: Any, weights: Any, state: Any) -> None:
    """One token a row through one layer.

    Args:
        threads: from team.num_threads().
        sizes: (B, D, G, N, H, dk, dv, F, c, 1 for SwiGLU).
        eps: of all norms.
        x: (B, D) float32, the residual stream, in and out.
        room, weights, state: tuples in the order of the unpacking below; see generation.fused_step.
    """
    rows, dim, groups, ndim, heads, dk, dv, hidden, size, gated = sizes
    tn, mx, v, z, r, h1, q, scores, summary, partial, attention, y, n, a, b, saved, nothing, ones = room
    norm, average, mixer, head_norm, table, wh2, ffn_norm, fc1, fc3, fc2, alpha = weights
    count, mean, var, h, keys, values, fill = state
    few = 1 if rows * dim < _FEW else threads

    for i in range(rows):
        count[i] += 1
    args = (x, (1, dim, groups, False), *norm, eps, mean, var, count, ones, tn, mean, var, nothing)
    timestep_norm(few, rows * groups, args)
    p, coefficient, g, omega = average
    share(
        _moving_average,
        1 if rows * dim * ndim < _FEW else threads,
        rows * dim,
        (tn, dim, ndim, p, coefficient, g, omega, h, y),
    )
    norm_forward_on_team(few, rows, (y, dim, *head_norm, False, eps, mx, saved))

    wv, wz, wr, wh1 = mixer
    products(threads, rows, (tn, dim, *wv, v), (mx, dim, *wz, z), (mx, dim, *wr, r), (mx, dim, *wh1, h1))
    shape = (size, heads, dk, dv)
    share(_enter_cache, few, rows, (z, v, *table, shape, eps, fill, q, keys, values))
    longest = 0
    for i in range(rows):
        longest = max(longest, fill[i])
    splits = longest // SPLIT + 1
    share(_attend, threads, rows * splits, (splits, q, keys, values, fill, shape, scores, summary, partial))
    share(_combine, few, rows * heads, (splits, heads, dv, summary, partial, r, attention))
    for i in range(rows):
        fill[i] = (fill[i] + 1) % size

    idle = (tn, dim, wh2[0], wh2[1][:0], y)
    products(threads, rows, (attention, heads * dv, *wh2, y), idle, idle, idle)
    _add(x, h1, y)
    norm_forward_on_team(few, rows, (y, dim, *ffn_norm, True, eps, n, saved))
    products(threads, rows, (n, dim, *fc1, a), (n, dim, fc3, fc1[1] if gated else idle[3], b), idle, idle)
    if gated:
        gate_forward_on_team(few, rows, (hidden, a, b, a))
    else:
        for i in range(rows):
            _silu(a, i * hidden, a, i * hidden, hidden)
    products(threads, rows, (a, hidden, *fc2, y), idle, idle, idle)
    for i in range(0, rows * dim, LANES):
        store(x, i, add_product(load(x, i), load(alpha, i % dim), load(y, i)))


@compiled
def head(threads: int, sizes: Any, eps: float, x: Any, room: Any, weights: Any, state: Any, logits: Any) -> None:
    """The residual stream x (B, D) to logits (B, vocabulary); sizes as in `layer`, of which B, D and G are used."""
    rows, dim, groups = sizes
    n, nothing, ones = room
    norm, output = weights
    count, mean, var = state
    for i in range(rows):
        count[i] += 1
    args = (x, (1, dim, groups, False), *norm, eps, mean, var, count, ones, n, mean, var, nothing)
    timestep_norm(1 if rows * dim < _FEW else threads, rows * groups, args)
    idle = (n, dim, output[0], output[1][:0], n)
    products(threads, rows, (n, dim, *output, logits), idle, idle, idle)
