"""What the adaptive memory does between its matrix products. All arrays are flat; heads lie side by side in a token."""

from typing import Any

import numpy as np

from .simd import LANES, compiled, exp, inner, larger, load, splat, store, sub_product, total
from .team import share


@inner
def weigh(first: int, last: int, keys: Any, size: int, width: int, weights: Any, highest: Any, sums: Any) -> None:
    """Groups first..last of 16 features: weights = e^(keys - highest) over the time of a chunk.

    Args:
        keys: (size, width); weights: the same, out; highest, sums: (width,) over time, out.
    """
    for group in range(first, last):
        at = group * LANES
        top = load(keys, at)
        for i in range(at + width, size * width, width):
            top = larger(top, load(keys, i))
        added = splat(np.float32(0))
        for i in range(at, size * width, width):
            weight = exp(load(keys, i) - top)
            store(weights, i, weight)
            added = added + weight
        store(highest, at, top)
        store(sums, at, added)


@inner
def begin(first: int, last: int, dim: int, added: Any, scale: Any, after: Any, rounded: Any) -> None:
    """Rows first..last of M (R, dim) after the first chunk of a document: scale * added; twice, the second rounded."""
    for row in range(first, last):
        by = splat(scale[row])
        for i in range(row * dim, (row + 1) * dim, LANES):
            value = by * load(added, i)
            store(after, i, value)
            store(rounded, i, value)


@inner
def step(
    first: int,
    last: int,
    dim: int,
    before: Any,
    added: Any,
    taken: Any,
    scale: Any,
    rho: Any,
    after: Any,
    rounded: Any,
) -> None:
    """Rows first..last of M (R, dim) after a later chunk: before + (scale * (added - taken) - rho * before)."""
    for row in range(first, last):
        by, share_of_chunk = splat(scale[row]), splat(rho[row])
        for i in range(row * dim, (row + 1) * dim, LANES):
            old = load(before, i)
            value = old + sub_product(by * (load(added, i) - load(taken, i)), share_of_chunk, old)
            store(after, i, value)
            store(rounded, i, value)


@inner
def step_back(
    first: int,
    last: int,
    dim: int,
    grad: Any,
    read: Any,
    taken: Any,
    before: Any,
    after: Any,
    scale: Any,
    rho: Any,
    of_added: Any,
    moved: Any,
    held: Any,
) -> None:
    """Rows first..last of gradients of `step`, but for what goes through `taken`.

    Args:
        grad: (R, dim) float32; with read - taken added it is the gradient of `after`; out: its part for `before`.
        before, after: M.
        of_added: gradient of `added`, out.
        moved, held: (R,) sums of the gradient times after - before, and times before, out.
    """
    for row in range(first, last):
        by, share_of_chunk = splat(scale[row]), splat(rho[row])
        change, kept = splat(np.float32(0)), splat(np.float32(0))
        for i in range(row * dim, (row + 1) * dim, LANES):
            some = load(grad, i) + (load(read, i) - load(taken, i))
            old = load(before, i)
            change = change + some * (load(after, i) - old)
            kept = kept + some * old
            store(of_added, i, by * some)
            store(grad, i, sub_product(some, share_of_chunk, some))
        moved[row], held[row] = total(change), total(kept)


@inner
def key_gradient(
    first: int,
    last: int,
    dim: int,
    weights: Any,
    of_weights: Any,
    of_sums: Any,
    predicting: Any,
    of_predicting: Any,
    grad: Any,
) -> None:
    """Rows first..last of tokens' heads: gradient of keys through `weigh`, and through their softmax over features.

    Args:
        weights, of_weights, predicting, of_predicting: (rows, dim), and their gradients; grad: the same, out.
        of_sums: (heads, dim) gradient of the sums of weights.
    """
    for row in range(first, last):
        at = row * dim
        own = at % of_sums.size
        product = splat(np.float32(0))
        for i in range(at, at + dim, LANES):
            product = product + load(predicting, i) * load(of_predicting, i)
        mean = splat(total(product))
        for i in range(0, dim, LANES):
            time = load(weights, at + i) * (load(of_weights, at + i) + load(of_sums, own + i))
            store(grad, at + i, time + load(predicting, at + i) * (load(of_predicting, at + i) - mean))


@compiled
def weigh_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """Weigh for all tasks."""
    share(weigh, threads, num_tasks, args)


@compiled
def begin_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """Begin for all tasks."""
    share(begin, threads, num_tasks, args)


@compiled
def step_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """Step for all tasks."""
    share(step, threads, num_tasks, args)


@compiled
def step_back_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """step_back for all tasks."""
    share(step_back, threads, num_tasks, args)


@compiled
def key_gradient_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """key_gradient for all tasks."""
    share(key_gradient, threads, num_tasks, args)
