"""TimestepNorm in one pass over x forward and one backward; statistics in float64, features in float32.

A task is one row and one group: its running statistics are a short recurrence over the tokens.
"""

from typing import Any

import numpy as np

from .simd import LANES, compiled, load, splat, store, total
from .team import share


@compiled
def _sums(x: Any, offset: int, width: int) -> Any:
    """Mean and population variance of one token's group, in float32."""
    if width % LANES == 0:
        part = load(x, offset)
        for i in range(LANES, width, LANES):
            part = part + load(x, offset + i)
        mean = total(part) / np.float32(width)
        centre = splat(mean)
        some = load(x, offset) - centre
        square = some * some
        for i in range(LANES, width, LANES):
            some = load(x, offset + i) - centre
            square = square + some * some
        return mean, total(square) / np.float32(width)
    mean = np.float32(0)
    for i in range(width):
        mean += x[offset + i]
    mean /= np.float32(width)
    var = np.float32(0)
    for i in range(width):
        var += (x[offset + i] - mean) ** 2
    return mean, np.float32(var / np.float32(width))


@compiled
def forward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    weight: Any,
    bias: Any,
    eps: float,
    entry_mean: Any,
    entry_var: Any,
    counts: Any,
    lengths: Any,
    y: Any,
    leaving_mean: Any,
    leaving_var: Any,
    saved: Any,
) -> None:
    """Tasks first..last; task k is row k // G and group k % G. All arrays are flat.

    Args:
        x: (B, L, D) float32.
        shape: (L, D, G, whether to save).
        weight, bias: (D,) float32; weight with its 1 added.
        entry_mean, entry_var: (B, G) float64.
        counts: (B, L) int64, tokens of the document up to and with each token.
        lengths: (B,) int64.
        y: (B, L, D) float32 or bf16, out.
        leaving_mean, leaving_var: as at the entry, out.
        saved: (B, G, L, 3) float64, out: mean of the token, running mean, and 1 / running deviation.
    """
    length, dim, groups, keep = shape
    width = dim // groups
    some = np.zeros(width + LANES, y.dtype)
    for task in range(first, last):
        b, group = task // groups, task % groups
        mean, var = entry_mean[task], entry_var[task]
        at = group * width
        for t in range(lengths[b]):
            n = counts[b * length + t]
            if n == 1:
                mean, var = 0.0, 0.0
            offset = (b * length + t) * dim + at
            token_mean, token_var = _sums(x, offset, width)
            away = token_mean - mean
            part = 1.0 / n
            mean += away * part
            var += part * (token_var - var + away * away * (1.0 - part))
            scale = 1.0 / np.sqrt(var + eps)
            if keep:
                to = (task * length + t) * 3
                saved[to], saved[to + 1], saved[to + 2] = token_mean, mean, scale
            centre, factor = np.float32(mean), np.float32(scale)
            if width % LANES == 0:
                middle, by = splat(centre), splat(factor)
                for i in range(0, width, LANES):
                    normed = (load(x, offset + i) - middle) * by
                    store(y, offset + i, normed * load(weight, at + i) + load(bias, at + i))
            else:
                for i in range(width):
                    normal = (x[offset + i] - centre) * factor
                    store(some, i, splat(np.float32(normal * weight[at + i] + bias[at + i])))
                for i in range(width):
                    y[offset + i] = some[i]
        leaving_mean[task] = mean
        leaving_var[task] = var


@compiled
def backward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    weight: Any,
    counts: Any,
    lengths: Any,
    saved: Any,
    entry_mean: Any,
    grad_y: Any,
    grad_mean: Any,
    grad_var: Any,
    grad_x: Any,
    grad_weight: Any,
    grad_bias: Any,
    grad_entry_mean: Any,
    grad_entry_var: Any,
) -> None:
    """Tasks first..last of the adjoint, from the last token to the first. All arrays are flat.

    Args:
        grad_y: (B, L, D) float32 or bf16; grad_mean, grad_var: (B, G) float64, of the exit statistics.
        grad_x: (B, L, D) float32, out; grad_weight, grad_bias: (B, D) float32, out;
            grad_entry_mean, grad_entry_var: (B, G) float64, out.
    """
    length, dim, groups, _ = shape
    width = dim // groups
    padded = -(-width // LANES) * LANES
    xs = np.zeros(padded, np.float32)
    dy = np.zeros(padded, np.float32)
    raw = np.zeros(padded, grad_y.dtype)
    dw = np.zeros(padded, np.float32)
    db = np.zeros(padded, np.float32)
    scales = np.zeros(padded, np.float32)
    for task in range(first, last):
        b, group = task // groups, task % groups
        at = group * width
        for i in range(width):
            dw[i], db[i], scales[i] = 0, 0, weight[at + i]
        to_mean, to_var = grad_mean[task], grad_var[task]
        for t in range(lengths[b] - 1, -1, -1):
            n = counts[b * length + t]
            offset = (b * length + t) * dim + at
            place = (task * length + t) * 3
            token_mean, mean, scale = saved[place], saved[place + 1], saved[place + 2]
            before = 0.0
            if n > 1:
                before = saved[place - 2] if t > 0 else entry_mean[task]
            centre, factor = splat(np.float32(mean)), splat(np.float32(scale))
            for i in range(width):
                raw[i] = grad_y[offset + i]
                xs[i] = x[offset + i]
            sum_first, sum_second = splat(np.float32(0)), splat(np.float32(0))
            for i in range(0, padded, LANES):
                grad = load(raw, i)
                normed = (load(xs, i) - centre) * factor
                store(dw, i, load(dw, i) + grad * normed)
                store(db, i, load(db, i) + grad)
                grad = grad * load(scales, i)
                store(dy, i, grad)
                sum_first = sum_first + grad
                sum_second = sum_second + grad * normed
            to_mean -= scale * total(sum_first)
            to_var -= 0.5 * scale * scale * total(sum_second)
            part = 1.0 / n
            away = token_mean - before
            to_away = 2.0 * to_var * part * (1.0 - part) * away
            to_token = np.float32((to_mean * part + to_away) / width)
            spread = np.float32(2.0 * to_var * part / width)
            to_mean = to_mean * (1.0 - part) - to_away
            to_var = to_var * (1.0 - part)
            shift, slope, own = splat(to_token), splat(spread), splat(np.float32(token_mean))
            for i in range(0, padded, LANES):
                store(dy, i, load(dy, i) * factor + shift + slope * (load(xs, i) - own))
            for i in range(width):
                grad_x[offset + i] = dy[i]
            if n == 1:
                to_mean, to_var = 0.0, 0.0
        for i in range(width):
            grad_weight[b * dim + at + i], grad_bias[b * dim + at + i] = dw[i], db[i]
        grad_entry_mean[task] = to_mean
        grad_entry_var[task] = to_var


@compiled
def forward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """forward for all tasks."""
    share(forward, threads, num_tasks, args)


@compiled
def backward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """backward for all tasks."""
    share(backward, threads, num_tasks, args)
