"""One token through one layer, or through the head, as one compiled call without gradients.

The state is changed in place and nothing is allocated. Activations are float32; weights and the attention cache are
float32 or bf16. All arrays are flat. Widths are multiples of 16.
"""

from typing import Any

import numpy as np

from . import scalars
from .elementwise_kernels import gate_forward, norm_forward
from .matrix_vector import num_groups, products
from .simd import LANES, add_product, compiled, exp, load, splat, store, sub_product, total
from .team import share
from .timestep_norm_kernels import forward as timestep_norm

SPLIT = 128  # keys in one task of attention
_FEW = 1 << 14  # operations that are not worth waking another thread for


@compiled
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


@compiled
def _mixer_products(
    first: int, last: int, rows: int, dim: int, tn: Any, mx: Any, wv: Any, wz: Any, wr: Any, wh1: Any
) -> None:
    """The four products of the mixer as one list of tasks; each of wv, wz, wr, wh1 is (weight, bias, output)."""
    at = 0
    for k in range(4):
        weight, bias, y = wv if k == 0 else wz if k == 1 else wr if k == 2 else wh1
        groups = num_groups(bias)
        low, high = max(first - at, 0), min(last - at, groups)
        if low < high:
            products(low, high, tn if k == 0 else mx, rows, dim, weight, bias, y)
        at += groups


@compiled
def _gate_products(
    first: int, last: int, rows: int, dim: int, x: Any, fc1: Any, fc3: Any, bias: Any, a: Any, b: Any
) -> None:
    """Both products of the feed-forward network as one list of tasks."""
    groups = num_groups(bias)
    if first < groups:
        products(first, min(last, groups), x, rows, dim, fc1, bias, a)
    if last > groups:
        products(max(first - groups, 0), last - groups, x, rows, dim, fc3, bias, b)


@compiled
def _silu(x: Any, at: int, y: Any, to: int, size: int) -> None:
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    for i in range(0, size, LANES):
        some = load(x, at + i)
        store(y, to + i, some / (one + exp(zero - some)))


@compiled
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


@compiled
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
    """Tasks first..last of (B, H, splits): softmax attention to SPLIT keys, not yet divided by its sum of weights.

    Args:
        scores: (tasks, SPLIT), scratch.
        summary: (tasks, 2), out: highest score and sum of weights.
        partial: (tasks, dv), out.
    """
    size, heads, dk, dv = shape
    for task in range(first, last):
        pair, split = task // splits, task % splits
        b, h = pair // heads, pair % heads
        begin = split * SPLIT
        count = min(SPLIT, fill[b] + 1 - begin)
        if count <= 0:
            summary[2 * task], summary[2 * task + 1] = np.float32(-np.inf), np.float32(0)
            continue
        at, out, mine = pair * dk, task * dv, task * SPLIT
        stride = heads * dk
        key = ((b * size + begin) * heads + h) * dk
        highest = np.float32(-np.inf)
        for j in range(count):
            sums = load(q, at) * load(keys, key)
            for i in range(LANES, dk, LANES):
                sums = add_product(sums, load(q, at + i), load(keys, key + i))
            score = total(sums)
            scores[mine + j] = score
            highest = max(highest, score)
            key += stride
        whole = -(-count // LANES) * LANES
        for j in range(count, whole):
            scores[mine + j] = np.float32(-np.inf)
        top = splat(highest)
        for j in range(0, whole, LANES):
            store(scores, mine + j, exp(load(scores, mine + j) - top))
        weights = np.float32(0)
        for j in range(count):
            weights += scores[mine + j]
        summary[2 * task], summary[2 * task + 1] = highest, weights

        stride = heads * dv
        value = ((b * size + begin) * heads + h) * dv
        zero = splat(np.float32(0))
        for i in range(0, dv, LANES):
            store(partial, out + i, zero)
        j = 0
        while j + 4 <= count:
            w0, w1 = splat(scores[mine + j]), splat(scores[mine + j + 1])
            w2, w3 = splat(scores[mine + j + 2]), splat(scores[mine + j + 3])
            for i in range(0, dv, LANES):
                some = add_product(load(partial, out + i), w0, load(values, value + i))
                some = add_product(some, w1, load(values, value + stride + i))
                some = add_product(some, w2, load(values, value + 2 * stride + i))
                store(partial, out + i, add_product(some, w3, load(values, value + 3 * stride + i)))
            value += 4 * stride
            j += 4
        while j < count:
            w0 = splat(scores[mine + j])
            for i in range(0, dv, LANES):
                store(partial, out + i, add_product(load(partial, out + i), w0, load(values, value + i)))
            value += stride
            j += 1


@compiled
def _combine(first: int, last: int, splits: int, dv: int, summary: Any, partial: Any, gate: Any, y: Any) -> None:
    """Pairs first..last of (B, H): join the splits, and multiply by silu of the gate."""
    one, zero = splat(np.float32(1)), splat(np.float32(0))
    for pair in range(first, last):
        task = pair * splits
        highest = summary[2 * task]
        for s in range(1, splits):
            highest = max(highest, summary[2 * (task + s)])
        weights = np.float32(0)
        for s in range(splits):
            part = np.float32(np.exp(summary[2 * (task + s)] - highest))
            weights += part * summary[2 * (task + s) + 1]
            summary[2 * (task + s)] = part
        for i in range(0, dv, LANES):
            some = zero
            for s in range(splits):
                if summary[2 * (task + s)] > 0:
                    some = add_product(some, splat(summary[2 * (task + s)]), load(partial, (task + s) * dv + i))
            g = load(gate, pair * dv + i)
            store(y, pair * dv + i, some * (g / (one + exp(zero - g))) / splat(weights))


@compiled
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
    args = (x, (1, dim, groups, 0), *norm, eps, mean, var, count, ones, tn, mean, var, nothing)
    share(timestep_norm, few, rows * groups, args)
    p, coefficient, g, omega = average
    share(
        _moving_average,
        1 if rows * dim * ndim < _FEW else threads,
        rows * dim,
        (tn, dim, ndim, p, coefficient, g, omega, h, y),
    )
    share(norm_forward, few, rows, (y, dim, *head_norm, False, eps, mx, saved))

    wv, wz, wr, wh1 = mixer
    tasks = num_groups(wv[1]) + num_groups(wz[1]) + num_groups(wr[1]) + num_groups(wh1[1])
    outputs = ((wv[0], wv[1], v), (wz[0], wz[1], z), (wr[0], wr[1], r), (wh1[0], wh1[1], h1))
    share(_mixer_products, threads, tasks, (rows, dim, tn, mx, *outputs))

    shape = (size, heads, dk, dv)
    share(_enter_cache, few, rows, (z, v, *table, shape, eps, fill, q, keys, values))
    longest = 0
    for i in range(rows):
        longest = max(longest, fill[i])
    splits = longest // SPLIT + 1
    share(_attend, threads, rows * heads * splits, (splits, q, keys, values, fill, shape, scores, summary, partial))
    share(_combine, few, rows * heads, (splits, dv, summary, partial, r, attention))
    for i in range(rows):
        fill[i] = (fill[i] + 1) % size

    share(products, threads, num_groups(wh2[1]), (attention, rows, heads * dv, *wh2, y))
    _add(x, h1, y)
    share(norm_forward, few, rows, (y, dim, *ffn_norm, True, eps, n, saved))
    bias = fc1[1]
    tasks = num_groups(bias)
    share(_gate_products, threads, tasks * (1 + gated), (rows, dim, n, fc1[0], fc3[0], bias, a, b))
    if gated:
        share(gate_forward, few, rows, (hidden, a, b, a))
    else:
        for i in range(rows):
            _silu(a, i * hidden, a, i * hidden, hidden)
    share(products, threads, num_groups(fc2[1]), (a, rows, hidden, *fc2, y))
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
    args = (x, (1, dim, groups, 0), *norm, eps, mean, var, count, ones, n, mean, var, nothing)
    share(timestep_norm, 1 if rows * dim < _FEW else threads, rows * groups, args)
    share(products, threads, num_groups(output[1]), (n, rows, dim, *output, logits))
