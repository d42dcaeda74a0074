"""Kernels over independent tokens: norms over features, gated products, sums of branches. All arrays are flat."""

from typing import Any

import numpy as np

from .simd import LANES, compiled, exact_sum, inner, load, sigmoid, splat, store, total
from .team import share

TASK = 256 * LANES  # elements that a task of gates takes


@inner
def mean_of(x: Any, at: int, size: int) -> Any:
    """Mean of `size` elements from `at`, a multiple of 16."""
    part = load(x, at)
    for i in range(at + LANES, at + size, LANES):
        part = part + load(x, i)
    return total(part) / np.float32(size)


@inner
def mean_square(x: Any, at: int, size: int, centre: Any) -> Any:
    """Mean square distance from `centre` of `size` elements from `at`, a multiple of 16."""
    middle = splat(centre)
    some = load(x, at) - middle
    square = some * some
    for i in range(at + LANES, at + size, LANES):
        some = load(x, i) - middle
        square = square + some * some
    return total(square) / np.float32(size)


@inner
def norm_forward(
    first: int, last: int, x: Any, dim: int, weight: Any, bias: Any, centred: bool, eps: float, y: Any, saved: Any
) -> None:
    """Tokens first..last of a RMS norm or, if centred, a layer norm over D features, D a multiple of 16.

    Args:
        x: (M, D); weight and bias: (H, D) float32, taken in turn; y: (M, D), out; saved: (M, 2), mean and scale, out.
    """
    for m in range(first, last):
        at, own = m * dim, m * dim % weight.size
        mean = mean_of(x, at, dim) if centred else np.float32(0)
        scale = np.float32(1 / np.sqrt(mean_square(x, at, dim, mean) + np.float32(eps)))
        saved[2 * m], saved[2 * m + 1] = mean, scale
        middle, by = splat(mean), splat(scale)
        for i in range(0, dim, LANES):
            store(y, at + i, (load(x, at + i) - middle) * by * load(weight, own + i) + load(bias, own + i))


@inner
def norm_backward(
    first: int,
    last: int,
    x: Any,
    dim: int,
    weight: Any,
    centred: bool,
    saved: Any,
    tokens: int,
    size: int,
    grad_y: Any,
    grad_x: Any,
    grad_weight: Any,
    grad_bias: Any,
) -> None:
    """Stretches first..last of `size` tokens: gradients to x (M, D), and per stretch to weight and bias (S, H, D)."""
    for stretch in range(first, last):
        begin = stretch * weight.size
        for i in range(begin, begin + weight.size):
            grad_weight[i] = 0
            grad_bias[i] = 0
        for m in range(stretch * size, min(tokens, (stretch + 1) * size)):
            at, own = m * dim, m * dim % weight.size
            to = begin + own
            middle, by = splat(saved[2 * m]), splat(saved[2 * m + 1])
            slope, shift = splat(np.float32(0)), splat(np.float32(0))
            for i in range(0, dim, LANES):
                normed = (load(x, at + i) - middle) * by
                grad = load(grad_y, at + i)
                store(grad_weight, to + i, load(grad_weight, to + i) + grad * normed)
                store(grad_bias, to + i, load(grad_bias, to + i) + grad)
                grad = grad * load(weight, own + i)
                slope = slope + grad * normed
                shift = shift + grad
            slope = splat(total(slope) / np.float32(dim))
            shift = splat(total(shift) / np.float32(dim) if centred else np.float32(0))
            for i in range(0, dim, LANES):
                normed = (load(x, at + i) - middle) * by
                store(grad_x, at + i, by * (load(grad_y, at + i) * load(weight, own + i) - shift - normed * slope))


@inner
def silu(x: Any, at: int, y: Any, to: int, size: int) -> None:
    """x sigmoid(x) of `size` elements from `at`, a multiple of 16, into those of y from `to`."""
    for i in range(0, size, LANES):
        value = load(x, at + i)
        store(y, to + i, value * sigmoid(value))


@inner
def silu_forward(first: int, last: int, size: int, x: Any, y: Any) -> None:
    """Stretches first..last of `size` elements, a multiple of 16: y = silu(x)."""
    silu(x, first * size, y, first * size, min(last * size, len(y)) - first * size)


@inner
def silu_backward(first: int, last: int, size: int, x: Any, grad_y: Any, grad_x: Any) -> None:
    """Gradient of silu_forward: dy / dx = s + x s (1 - s) with s = sigmoid(x)."""
    one = splat(np.float32(1))
    for i in range(first * size, min(last * size, len(grad_x)), LANES):
        value = load(x, i)
        s = sigmoid(value)
        store(grad_x, i, load(grad_y, i) * (s + value * s * (one - s)))


@inner
def gate_forward(first: int, last: int, size: int, gate: Any, x: Any, y: Any) -> None:
    """Stretches first..last of `size` elements, a multiple of 16: y = silu(gate) * x."""
    for i in range(first * size, min(last * size, len(y)), LANES):
        g = load(gate, i)
        store(y, i, g * sigmoid(g) * load(x, i))


@inner
def gate_backward(
    first: int, last: int, size: int, gate: Any, x: Any, grad_y: Any, grad_gate: Any, grad_x: Any
) -> None:
    """Gradients of gate_forward: d silu(g) / dg = s + g s (1 - s) with s = sigmoid(g)."""
    one = splat(np.float32(1))
    for i in range(first * size, min(last * size, len(grad_x)), LANES):
        g, grad = load(gate, i), load(grad_y, i)
        s = sigmoid(g)
        y = g * s
        store(grad_x, i, grad * y)
        store(grad_gate, i, grad * load(x, i) * (s + y * (one - s)))


@inner
def add_one(first: int, last: int, size: int, x: Any, branch: Any, y: Any) -> None:
    """Stretches first..last of `size` elements, a multiple of 16: y = x + branch."""
    for i in range(first * size, min(last * size, len(y)), LANES):
        store(y, i, load(x, i) + load(branch, i))


@inner
def add_two(first: int, last: int, size: int, x: Any, branch: Any, other: Any, y: Any) -> None:
    """Stretches first..last of `size` elements, a multiple of 16: y = x + (branch + other), rounded as tensors are."""
    for i in range(first * size, min(last * size, len(y)), LANES):
        store(y, i, load(x, i) + exact_sum(branch, load(branch, i), load(other, i)))


@compiled
def norm_forward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """norm_forward for all tasks."""
    share(norm_forward, threads, num_tasks, args)


@compiled
def norm_backward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """norm_backward for all tasks."""
    share(norm_backward, threads, num_tasks, args)


@compiled
def silu_forward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """silu_forward for all tasks."""
    share(silu_forward, threads, num_tasks, args)


@compiled
def silu_backward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """silu_backward for all tasks."""
    share(silu_backward, threads, num_tasks, args)


@compiled
def gate_forward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """gate_forward for all tasks."""
    share(gate_forward, threads, num_tasks, args)


@compiled
def gate_backward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """gate_backward for all tasks."""
    share(gate_backward, threads, num_tasks, args)


@compiled
def add_one_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """add_one for all tasks."""
    share(add_one, threads, num_tasks, args)


@compiled
def add_two_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """add_two for all tasks."""
    share(add_two, threads, num_tasks, args)
