"""Token shift in one pass each way: sixteen features of a row at a time, along its tokens."""

from typing import Any

import numpy as np

from .simd import LANES, add_product, compiled, inner, load, splat, store
from .team import share


@inner
def _forward(
    first: int, last: int, shape: Any, x: Any, mix: Any, entry: Any, starts: Any, lengths: Any, y: Any
) -> None:
    batch, length, dim, count = shape
    groups = dim // LANES
    for task in range(first, last):
        row, c = task // groups, task % groups * LANES
        before = load(entry, row * dim + c)
        for t in range(lengths[row]):
            at = (row * length + t) * dim + c
            if starts[row * length + t]:
                before = splat(np.float32(0))
            own = load(x, at)
            step = before - own
            for n in range(count):
                store(y, n * batch * length * dim + at, add_product(own, load(mix, n * dim + c), step))
            before = own


@inner
def _backward(
    first: int,
    last: int,
    shape: Any,
    x: Any,
    mix: Any,
    entry: Any,
    starts: Any,
    lengths: Any,
    dy: Any,
    dx: Any,
    dmix: Any,
    dentry: Any,
) -> None:
    batch, length, dim, count = shape
    groups = dim // LANES
    zero = splat(np.float32(0))
    for task in range(first, last):
        row, c = task // groups, task % groups * LANES
        for n in range(count):
            store(dmix, (row * count + n) * dim + c, zero)
        later = zero  # what the token after gives to this one
        for t in range(lengths[row] - 1, -1, -1):
            at = (row * length + t) * dim + c
            begins = starts[row * length + t]
            before = load(entry, row * dim + c) if t == 0 else load(x, at - dim)
            if begins:
                before = zero
            step = before - load(x, at)
            whole, earlier = zero, zero
            for n in range(count):
                g, own = load(dy, n * batch * length * dim + at), (row * count + n) * dim + c
                whole, earlier = whole + g, add_product(earlier, g, load(mix, n * dim + c))
                store(dmix, own, add_product(load(dmix, own), g, step))
            store(dx, at, later + (whole - earlier))
            later = zero if begins else earlier
        store(dentry, row * dim + c, later)


@compiled
def forward(threads: int, num_tasks: int, args: Any) -> None:
    """Groups of 16 features of all rows: shape (B, L, D, N), x, mix, entry, starts, lengths; out: y."""
    share(_forward, threads, num_tasks, args)


@compiled
def backward(threads: int, num_tasks: int, args: Any) -> None:
    """Gradients: shape, x, mix, entry, starts, lengths, dy; out: dx, dmix (B, N, D), dentry, the last two float32."""
    share(_backward, threads, num_tasks, args)
