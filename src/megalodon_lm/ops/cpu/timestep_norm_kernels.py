"""Norms over time, forward and backward: statistics in float64, features in float32.

TimestepNorm and the norm that forgets differ only in how much of the running statistics a token replaces, which is told
by `decays`: `CUMULATIVE`, or those of ops/decay_norm.py. One compiled kernel runs both.

Forward and backward go over the tokens twice, as they lie in memory, any thread any of them: for the sums of each token
and for its features. Between them the statistics follow one another from token to token, a short recurrence of each
group, over arrays of their own. Threads that took groups waited for memory: pieces of a token lie too far apart.
"""

import math
from typing import Any

import numpy as np

from .elementwise_kernels import mean_of, mean_square
from .simd import LANES, compiled, inner, load, splat, store, total
from .team import share

CUMULATIVE = (1.0, 1.0)
"""Nothing is forgotten, and the variance also counts how far the means of tokens lie apart."""

TOGETHER = 8  # groups whose statistics a task follows


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
def _count_tokens(b: int, used: int, length: int, before: Any, starts: Any, counts: Any) -> None:
    """Tokens of the document up to and with each token of a row."""
    n = before[b]
    for t in range(used):
        if starts.size and starts[b * length + t]:
            n = 0
        n += 1
        counts[t] = n


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
def _find_moments(first: int, last: int, x: Any, shape: Any, lengths: Any, moments: Any) -> None:
    """Tokens first..last of all rows: mean and variance of each of their groups."""
    length, dim, groups = shape
    width = dim // groups
    for token in range(first, last):
        if token % length < lengths[token // length]:
            at, to = token * dim, token * 3 * groups
            for k in range(groups):
                mean, var = _sums(x, at + k * width, width)
                moments[to + k], moments[to + groups + k] = mean, var


@inner
def _run_statistics(
    first: int,
    last: int,
    shape: Any,
    eps: float,
    decays: Any,
    entry_mean: Any,
    entry_var: Any,
    before: Any,
    starts: Any,
    lengths: Any,
    leaving_mean: Any,
    leaving_var: Any,
    moments: Any,
) -> None:
    """One task is TOGETHER groups of a row: a running mean and 1 / deviation in place of each token's variance."""
    length, _, groups = shape
    parts = -(-groups // TOGETHER)
    means, variances, counts = np.empty(TOGETHER), np.empty(TOGETHER), np.empty(length, np.int64)
    for task in range(first, last):
        b, begin = task // parts, task % parts * TOGETHER
        held = min(TOGETHER, groups - begin)
        own = b * groups + begin
        _count_tokens(b, lengths[b], length, before, starts, counts)
        for k in range(held):
            means[k], variances[k] = entry_mean[own + k], entry_var[own + k]
        for t in range(lengths[b]):
            n = counts[t]
            part, var_part, between, mean_gain, var_gain = _rates(n, decays)
            if n == 1:  # a document begins
                means[:held] = 0.0
                variances[:held] = 0.0
            at = (b * length + t) * 3 * groups + begin
            for k in range(held):
                away = moments[at + k] - means[k]
                apart = away * away * between if between > 0.0 else 0.0  # a mean of NaN is none of the variance's
                means[k] += away * part
                variances[k] += var_part * (moments[at + groups + k] - variances[k] + apart)
                moments[at + groups + k] = means[k] * mean_gain
                moments[at + 2 * groups + k] = 1.0 / np.sqrt(variances[k] * var_gain + eps)
        for k in range(held):
            leaving_mean[own + k], leaving_var[own + k] = means[k], variances[k]


@inner
def _normalise(
    first: int, last: int, x: Any, shape: Any, weight: Any, bias: Any, lengths: Any, moments: Any, y: Any
) -> None:
    """Tokens first..last of all rows: their features, by the running statistics."""
    length, dim, groups = shape
    width = dim // groups
    aligned = width % LANES == 0
    some = np.zeros(width + LANES, y.dtype)
    for token in range(first, last):
        if token % length >= lengths[token // length]:
            continue
        for k in range(groups):
            at, offset = k * width, token * dim + k * width
            centre = np.float32(moments[(token * 3 + 1) * groups + k])
            factor = np.float32(moments[(token * 3 + 2) * groups + k])
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


@inner
def _find_sums(
    first: int,
    last: int,
    size: int,
    x: Any,
    shape: Any,
    weight: Any,
    lengths: Any,
    moments: Any,
    grad_y: Any,
    sums: Any,
    grad_weight: Any,
    grad_bias: Any,
) -> None:
    """Stretches first..last of `size` tokens: per group the sums of a token's gradients, alone and times its features.

    Of each stretch the gradients to weight and bias besides.
    """
    length, dim, groups = shape
    width = dim // groups
    padded = -(-width // LANES) * LANES
    aligned = width == padded
    xs, raw = np.zeros(padded, np.float32), np.zeros(padded, grad_y.dtype)
    sources, incoming = (x, grad_y) if aligned else (xs, raw)
    dw, db = np.empty(groups * padded, np.float32), np.empty(groups * padded, np.float32)
    scales = _padded(weight, groups, width, padded)
    for stretch in range(first, last):
        dw[:] = 0
        db[:] = 0
        for token in range(stretch * size, min(len(lengths) * length, (stretch + 1) * size)):
            if token % length >= lengths[token // length]:
                continue
            for k in range(groups):
                own, source = k * padded, token * dim + k * width
                if not aligned:
                    for i in range(width):
                        raw[i], xs[i] = grad_y[source + i], x[source + i]
                    source = 0
                centre = splat(np.float32(moments[(token * 3 + 1) * groups + k]))
                factor = splat(np.float32(moments[(token * 3 + 2) * groups + k]))
                sum_first, sum_second = splat(np.float32(0)), splat(np.float32(0))
                for i in range(0, padded, LANES):
                    grad = load(incoming, source + i)
                    normed = (load(sources, source + i) - centre) * factor
                    store(dw, own + i, load(dw, own + i) + grad * normed)
                    store(db, own + i, load(db, own + i) + grad)
                    grad = grad * load(scales, own + i)
                    sum_first = sum_first + grad
                    sum_second = sum_second + grad * normed
                sums[token * 2 * groups + k] = total(sum_first)
                sums[(token * 2 + 1) * groups + k] = total(sum_second)
        for k in range(groups):
            for i in range(width):
                to = stretch * dim + k * width + i
                grad_weight[to], grad_bias[to] = dw[k * padded + i], db[k * padded + i]


@inner
def _padded(weight: Any, groups: int, width: int, padded: int) -> Any:
    """Each group's weights, with zeros up to whole vectors."""
    scales = np.zeros(groups * padded, np.float32)
    for k in range(groups):
        scales[k * padded : k * padded + width] = weight[k * width : (k + 1) * width]
    return scales


@inner
def _run_adjoint(
    first: int,
    last: int,
    shape: Any,
    decays: Any,
    before: Any,
    starts: Any,
    lengths: Any,
    moments: Any,
    entry_mean: Any,
    grad_mean: Any,
    grad_var: Any,
    sums: Any,
    grad_entry_mean: Any,
    grad_entry_var: Any,
) -> None:
    """One task is TOGETHER groups of a row, from the last token to the first, by the sums of _find_sums.

    In their place it leaves what every feature's gradient is shifted by, and the slope by which its distance from the
    token's mean adds to it.
    """
    length, dim, groups = shape
    width = dim // groups
    parts = -(-groups // TOGETHER)
    to_means, to_vars, counts = np.empty(TOGETHER), np.empty(TOGETHER), np.empty(length, np.int64)
    for task in range(first, last):
        b, begin = task // parts, task % parts * TOGETHER
        held = min(TOGETHER, groups - begin)
        own = b * groups + begin
        _count_tokens(b, lengths[b], length, before, starts, counts)
        for k in range(held):
            to_means[k], to_vars[k] = grad_mean[own + k], grad_var[own + k]
        for t in range(lengths[b] - 1, -1, -1):
            token = b * length + t
            n = counts[t]
            part, var_part, between, mean_gain, var_gain = _rates(n, decays)
            at, to = token * 3 * groups + begin, token * 2 * groups + begin
            for k in range(held):
                centre = 0.0  # before this token
                if n > 1:
                    centre = moments[at - 2 * groups + k] if t > 0 else entry_mean[own + k]
                scale = moments[at + 2 * groups + k]
                to_mean = to_means[k] - scale * mean_gain * sums[to + k]
                to_var = to_vars[k] - 0.5 * scale * scale * var_gain * sums[to + groups + k]
                to_away = 2.0 * to_var * var_part * between * (moments[at + k] - centre)
                sums[to + k] = (to_mean * part + to_away) / width
                sums[to + groups + k] = 2.0 * to_var * var_part / width
                to_means[k] = to_mean * (1.0 - part) - to_away if n > 1 else 0.0
                to_vars[k] = to_var * (1.0 - var_part) if n > 1 else 0.0
        for k in range(held):
            grad_entry_mean[own + k], grad_entry_var[own + k] = to_means[k], to_vars[k]


@inner
def _find_gradients(
    first: int,
    last: int,
    x: Any,
    shape: Any,
    weight: Any,
    lengths: Any,
    moments: Any,
    grad_y: Any,
    sums: Any,
    grad_x: Any,
) -> None:
    """Tokens first..last of all rows: the gradients of their features, by what _run_adjoint found."""
    length, dim, groups = shape
    width = dim // groups
    padded = -(-width // LANES) * LANES
    aligned = width == padded
    xs, raw, dx = np.zeros(padded, np.float32), np.zeros(padded, grad_y.dtype), np.zeros(padded, np.float32)
    sources, incoming, outgoing = (x, grad_y, grad_x) if aligned else (xs, raw, dx)
    scales = _padded(weight, groups, width, padded)
    for token in range(first, last):
        if token % length >= lengths[token // length]:
            continue
        for k in range(groups):
            own, at = k * padded, token * dim + k * width
            source = at
            if not aligned:
                for i in range(width):
                    raw[i], xs[i] = grad_y[at + i], x[at + i]
                source = 0
            middle = splat(np.float32(moments[token * 3 * groups + k]))
            factor = splat(np.float32(moments[(token * 3 + 2) * groups + k]))
            shift = splat(np.float32(sums[token * 2 * groups + k]))
            slope = splat(np.float32(sums[(token * 2 + 1) * groups + k]))
            for i in range(0, padded, LANES):
                grad = load(incoming, source + i) * load(scales, own + i) * factor
                store(outgoing, source + i, grad + shift + slope * (load(sources, source + i) - middle))
            if not aligned:
                for i in range(width):
                    grad_x[at + i] = dx[i]


@compiled
def forward_on_team(threads: int, num_tokens: int, args: Any) -> None:
    """y and the statistics at the exit.

    Args:
        threads: from num_threads().
        num_tokens: B L.
        args: of these arrays, all flat, and numbers:
            x: (B, L, D) float32.
            shape: (L, D, G).
            weight, bias: (D,) float32; weight with its 1 added.
            eps: added to the variance.
            decays: of mean and variance over one token, or CUMULATIVE.
            entry_mean, entry_var: (B, G) float64.
            before: (B,) int64, tokens of the continued document before the piece.
            starts: (B, L) bool, where documents begin; empty for nowhere.
            lengths: (B,) int64.
            y: (B, L, D) float32 or bf16, out.
            leaving_mean, leaving_var: as at the entry, out; they may be the same.
            moments: (B, L, 3, G) float64, out: mean of the token, running mean, 1 / running deviation, as y took them.
    """
    x, shape, weight, bias, eps, decays, entry_mean, entry_var = args[:8]
    before, starts, lengths, y, leaving_mean, leaving_var, moments = args[8:]
    share(_find_moments, threads, num_tokens, (x, shape, lengths, moments))
    statistics = (entry_mean, entry_var, before, starts, lengths, leaving_mean, leaving_var, moments)
    share(_run_statistics, threads, len(lengths) * -(-shape[2] // TOGETHER), (shape, eps, decays, *statistics))
    share(_normalise, threads, num_tokens, (x, shape, weight, bias, lengths, moments, y))


@compiled
def backward_on_team(threads: int, num_tokens: int, args: Any) -> None:
    """The adjoint.

    Args:
        threads, num_tokens: as forward.
        args: of these arrays, all flat, and numbers:
            size: tokens of a stretch, whose gradients to the weights are summed.
            x, shape, weight, decays, before, starts, lengths, entry_mean: as forward.
            moments: from forward.
            grad_y: (B, L, D) float32 or bf16; grad_mean, grad_var: (B, G) float64, of the exit statistics.
            sums: (B, L, 2, G) float64, scratch.
            grad_x: (B, L, D) float32, out; grad_weight, grad_bias: (S, D) float32 for S stretches, out.
            grad_entry_mean, grad_entry_var: (B, G) float64, out.
    """
    size, x, shape, weight, decays, before, starts, lengths, entry_mean, moments = args[:10]
    grad_y, grad_mean, grad_var, sums, grad_x, grad_weight, grad_bias, grad_entry_mean, grad_entry_var = args[10:]
    features = (x, shape, weight, lengths, moments, grad_y, sums)
    share(_find_sums, threads, -(-num_tokens // size), (size, *features, grad_weight, grad_bias))
    places = (before, starts, lengths)
    statistics = (moments, entry_mean, grad_mean, grad_var, sums, grad_entry_mean, grad_entry_var)
    share(_run_adjoint, threads, len(lengths) * -(-shape[2] // TOGETHER), (shape, decays, *places, *statistics))
    share(_find_gradients, threads, num_tokens, (*features, grad_x))
