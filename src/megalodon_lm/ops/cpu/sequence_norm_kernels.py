"""SequenceNorm of each feature by itself: sixteen features of a row at a time, along its steps."""

from typing import Any

import numpy as np

from .simd import LANES, add_product, compiled, inner, load, splat, store
from .team import share

_STRETCH = 64  # steps summed by themselves, so that rounding does not grow with the length


@inner
def _mean(x: Any, at: int, dim: int, length: int, centre: Any, squared: bool) -> Any:
    """Mean over the steps of x - centre, or of its square."""
    whole = splat(np.float32(0))
    for first in range(0, length, _STRETCH):
        part = splat(np.float32(0))
        for t in range(first, min(length, first + _STRETCH)):
            value = load(x, at + t * dim) - centre
            part = add_product(part, value, value) if squared else part + value
        whole = whole + part
    return whole * splat(np.float32(1 / max(length, 1)))


@inner
def _forward(
    first: int,
    last: int,
    shape: Any,
    x: Any,
    weight: Any,
    bias: Any,
    eps: Any,
    lengths: Any,
    y: Any,
    means: Any,
    scales: Any,
) -> None:
    _, length, dim = shape
    groups = dim // LANES
    for task in range(first, last):
        row, c = task // groups, task % groups * LANES
        at, end = row * length * dim + c, lengths[row]
        mean = _mean(x, at, dim, end, splat(np.float32(0)), False)
        variance = _mean(x, at, dim, end, mean, True)
        store(means, row * dim + c, mean)
        store(scales, row * dim + c, variance)
        for i in range(row * dim + c, row * dim + c + LANES):
            scales[i] = np.float32(1 / np.sqrt(scales[i] + eps))
        by, shift = load(scales, row * dim + c) * load(weight, c), load(bias, c)
        for t in range(end):
            store(y, at + t * dim, add_product(shift, load(x, at + t * dim) - mean, by))


@inner
def _backward(
    first: int,
    last: int,
    shape: Any,
    x: Any,
    weight: Any,
    lengths: Any,
    means: Any,
    scales: Any,
    dy: Any,
    dx: Any,
    dweight: Any,
    dbias: Any,
) -> None:
    _, length, dim = shape
    groups = dim // LANES
    for task in range(first, last):
        row, c = task // groups, task % groups * LANES
        at, own, end = row * length * dim + c, row * dim + c, lengths[row]
        mean, scale = load(means, own), load(scales, own)
        slope, shift = splat(np.float32(0)), splat(np.float32(0))
        for start in range(0, end, _STRETCH):
            part, other = splat(np.float32(0)), splat(np.float32(0))
            for t in range(start, min(end, start + _STRETCH)):
                grad = load(dy, at + t * dim)
                part = add_product(part, grad, (load(x, at + t * dim) - mean) * scale)
                other = other + grad
            slope, shift = slope + part, shift + other
        store(dweight, own, slope)
        store(dbias, own, shift)
        share_of_one = splat(np.float32(1 / max(end, 1)))
        slope, shift, by = slope * share_of_one, shift * share_of_one, scale * load(weight, c)
        for t in range(end):
            normed = (load(x, at + t * dim) - mean) * scale
            store(dx, at + t * dim, by * (load(dy, at + t * dim) - shift - normed * slope))


@compiled
def forward(threads: int, num_tasks: int, args: Any) -> None:
    """Groups of 16 features of all rows: shape (B, L, D), x, weight, bias, eps, lengths; out: y, means, scales."""
    share(_forward, threads, num_tasks, args)


@compiled
def backward(threads: int, num_tasks: int, args: Any) -> None:
    """Gradients: shape, x, weight, lengths, means, scales, dy; out: dx, dweight and dbias (B, D)."""
    share(_backward, threads, num_tasks, args)
