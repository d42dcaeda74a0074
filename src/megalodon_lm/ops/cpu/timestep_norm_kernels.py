"""Norms over time in one pass over x forward and one backward; statistics in float64, features in float32.

TimestepNorm and the norm that forgets differ only in how much of the running statistics a token replaces, which is told
by `decays`: `CUMULATIVE`, or those of ops/decay_norm.py. One compiled kernel runs both.

A task is one row and one group: its running statistics are a short recurrence over the tokens. The groups of a row that
fall to one thread are taken token by token together, in three passes: the sums of each, then the statistics of all,
where one division and one root serve several groups, then the features of each.
"""

import math
from typing import Any

import numpy as np

from .elementwise_kernels import mean_of, mean_square
from .simd import LANES, compiled, inner, load, splat, store, total
from .team import share

CUMULATIVE = (1.0, 1.0)
"""Nothing is forgotten, and the variance also counts how far the means of tokens lie apart."""


@inner
def _mass(n: int, decay: float) -> float:
    """1 - decay^n, to the last digits for few tokens too."""
    return -math.expm1(n * math.log(decay))


@inner
def _rates(n: int, decays: Any) -> Any:
    """How the n-th token of a document enters the running statistics.

    Returns:
        The part that its mean has in the running mean, and its variance in the running variance; the weight of their
        squared distance in its variance; and what mean and variance are multiplied by, since they started at zero.
    """
    mean_decay, var_decay = decays
    if mean_decay == 1.0:
        part = 1.0 / n
        return part, part, 1.0 - part, 1.0, 1.0
    return 1.0 - mean_decay, 1.0 - var_decay, 0.0, 1.0 / _mass(n, mean_decay), 1.0 / _mass(n, var_decay)


@inner
def _sums(x: Any, offset: int, width: int) -> Any:
    """Mean and population variance of one token's group, in float32."""
    if width % LANES == 0:
        mean = mean_of(x, offset, width)
        return mean, mean_square(x, offset, width, mean)
    mean = np.float32(0)
    for i in range(width):
        mean += x[offset + i]
    mean /= np.float32(width)
    var = np.float32(0)
    for i in range(width):
        var += (x[offset + i] - mean) ** 2
    return mean, np.float32(var / np.float32(width))


@inner
def forward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    weight: Any,
    bias: Any,
    eps: float,
    decays: Any,
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
        decays: of mean and variance over one token, or CUMULATIVE.
        entry_mean, entry_var: (B, G) float64.
        counts: (B, L) int64, tokens of the document up to and with each token.
        lengths: (B,) int64.
        y: (B, L, D) float32 or bf16, out.
        leaving_mean, leaving_var: as at the entry, out.
        saved: (B, G, L, 3) float64, out: mean of the token, running mean, and 1 / running deviation, as y took them.
    """
    length, dim, groups, keep = shape
    width = dim // groups
    aligned = width % LANES == 0
    some = np.zeros(width + LANES, y.dtype)
    means, variances = np.empty(groups), np.empty(groups)
    token_means, token_variances = np.empty(groups), np.empty(groups)
    centres, factors = np.empty(groups), np.empty(groups)
    task = first
    while task < last:
        b = task // groups
        end = min(last, (b + 1) * groups)
        held = end - task
        begin = (task - b * groups) * width
        for k in range(held):
            means[k], variances[k] = entry_mean[task + k], entry_var[task + k]
        for t in range(lengths[b]):
            n = counts[b * length + t]
            part, var_part, between, mean_gain, var_gain = _rates(n, decays)
            start = (b * length + t) * dim + begin
            for k in range(held):
                token_means[k], token_variances[k] = _sums(x, start + k * width, width)
            if n == 1:  # a document begins
                means[:held] = 0.0
                variances[:held] = 0.0
            for k in range(held):
                away = token_means[k] - means[k]
                apart = away * away * between if between > 0.0 else 0.0  # a mean of NaN is none of the variance's
                means[k] += away * part
                variances[k] += var_part * (token_variances[k] - variances[k] + apart)
                centres[k], factors[k] = means[k] * mean_gain, 1.0 / np.sqrt(variances[k] * var_gain + eps)
            if keep:
                for k in range(held):
                    to = ((task + k) * length + t) * 3
                    saved[to], saved[to + 1], saved[to + 2] = token_means[k], centres[k], factors[k]
            for k in range(held):
                at, offset = begin + k * width, start + k * width
                centre, factor = np.float32(centres[k]), np.float32(factors[k])
                if aligned:
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
        for k in range(held):
            leaving_mean[task + k], leaving_var[task + k] = means[k], variances[k]
        task = end


@inner
def backward(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    weight: Any,
    decays: Any,
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
    aligned = width == padded
    xs = np.zeros(padded, np.float32)
    raw = np.zeros(padded, grad_y.dtype)
    dy = np.zeros(padded, np.float32)
    sources, incoming, outgoing = (x, grad_y, grad_x) if aligned else (xs, raw, dy)
    dw = np.empty(groups * padded, np.float32)
    db = np.empty(groups * padded, np.float32)
    scales = np.zeros(groups * padded, np.float32)
    for group in range(groups):
        for i in range(width):
            scales[group * padded + i] = weight[group * width + i]
    to_means, to_vars = np.empty(groups), np.empty(groups)
    task = first
    while task < last:
        b = task // groups
        end = min(last, (b + 1) * groups)
        begin, stop = task - b * groups, end - b * groups
        for i in range(begin * padded, stop * padded):
            dw[i], db[i] = 0, 0
        for group in range(begin, stop):
            to_means[group], to_vars[group] = grad_mean[b * groups + group], grad_var[b * groups + group]
        for t in range(lengths[b] - 1, -1, -1):
            n = counts[b * length + t]
            part, var_part, between, mean_gain, var_gain = _rates(n, decays)
            for group in range(begin, stop):
                own = group * padded
                offset = (b * length + t) * dim + group * width
                place = ((b * groups + group) * length + t) * 3
                token_mean, mean, scale = saved[place], saved[place + 1], saved[place + 2]
                before = 0.0
                if n > 1:
                    before = saved[place - 2] if t > 0 else entry_mean[b * groups + group]
                source = offset
                if not aligned:
                    source = 0
                    for i in range(width):
                        raw[i] = grad_y[offset + i]
                        xs[i] = x[offset + i]
                centre, factor = splat(np.float32(mean)), splat(np.float32(scale))
                sum_first, sum_second = splat(np.float32(0)), splat(np.float32(0))
                for i in range(0, padded, LANES):
                    grad = load(incoming, source + i)
                    normed = (load(sources, source + i) - centre) * factor
                    store(dw, own + i, load(dw, own + i) + grad * normed)
                    store(db, own + i, load(db, own + i) + grad)
                    grad = grad * load(scales, own + i)
                    sum_first = sum_first + grad
                    sum_second = sum_second + grad * normed
                to_mean = to_means[group] - scale * mean_gain * total(sum_first)
                to_var = to_vars[group] - 0.5 * scale * scale * var_gain * total(sum_second)
                away = token_mean - before
                to_away = 2.0 * to_var * var_part * between * away
                shift = splat(np.float32((to_mean * part + to_away) / width))
                slope = splat(np.float32(2.0 * to_var * var_part / width))
                middle = splat(np.float32(token_mean))
                for i in range(0, padded, LANES):
                    grad = load(incoming, source + i) * load(scales, own + i) * factor
                    store(outgoing, source + i, grad + shift + slope * (load(sources, source + i) - middle))
                if not aligned:
                    for i in range(width):
                        grad_x[offset + i] = dy[i]
                to_means[group] = to_mean * (1.0 - part) - to_away if n > 1 else 0.0
                to_vars[group] = to_var * (1.0 - var_part) if n > 1 else 0.0
        for group in range(begin, stop):
            for i in range(width):
                to = b * dim + group * width + i
                grad_weight[to], grad_bias[to] = dw[group * padded + i], db[group * padded + i]
            grad_entry_mean[b * groups + group] = to_means[group]
            grad_entry_var[b * groups + group] = to_vars[group]
        task = end


@compiled
def forward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """forward for all tasks."""
    share(forward, threads, num_tasks, args)


@compiled
def backward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """backward for all tasks."""
    share(backward, threads, num_tasks, args)
