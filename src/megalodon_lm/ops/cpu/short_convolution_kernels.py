"""Kernels of the short convolution: shifted products of a window, K - 1 inputs before L of its own. Arrays are flat."""

from typing import Any

import numpy as np

from .simd import LANES, add_product, compiled, inner, load, splat, store
from .team import share


@inner
def forward(
    first: int, last: int, size: int, length: int, dim: int, window: Any, taps: Any, bias: Any, seen: Any, y: Any
) -> None:
    """Stretches first..last of `size` tokens of B rows after each other.

    Args:
        window: (B, K - 1 + L, D), D a multiple of 16; taps: (K, D) and bias: (D,), float32; seen: (B, L), how many
            tokens before each one count, at most K - 1; y: (B, L, D), out.
    """
    before = len(taps) // dim - 1
    for n in range(first * size, min(last * size, len(seen))):
        at = (n + (n // length + 1) * before) * dim
        for i in range(0, dim, LANES):
            some = load(bias, i)
            for j in range(seen[n] + 1):
                some = add_product(some, load(taps, (before - j) * dim + i), load(window, at - j * dim + i))
            store(y, n * dim + i, some)


@inner
def backward(
    first: int,
    last: int,
    size: int,
    length: int,
    dim: int,
    window: Any,
    taps: Any,
    seen: Any,
    grad_y: Any,
    grad_window: Any,
    grad_taps: Any,
    grad_bias: Any,
) -> None:
    """Stretches first..last of `size` inputs: gradients to them, and per stretch to taps (S, K, D) and bias (S, D)."""
    before = len(taps) // dim - 1
    wide = length + before
    for stretch in range(first, last):
        to = stretch * (before + 1) * dim
        for i in range((before + 1) * dim):
            grad_taps[to + i] = 0
        for i in range(dim):
            grad_bias[stretch * dim + i] = 0
        for n in range(stretch * size, min((stretch + 1) * size, len(window) // dim)):
            row, own = n // wide, n % wide - before  # the token whose input this is; negative before the first
            for i in range(0, dim, LANES):
                x, grad = load(window, n * dim + i), splat(np.float32(0))
                for j in range(max(0, -own), min(before + 1, length - own)):
                    token = row * length + own + j
                    if seen[token] >= j:
                        g, tap = load(grad_y, token * dim + i), (before - j) * dim + i
                        grad = add_product(grad, load(taps, tap), g)
                        store(grad_taps, to + tap, add_product(load(grad_taps, to + tap), g, x))
                        if j == 0:
                            store(grad_bias, stretch * dim + i, load(grad_bias, stretch * dim + i) + g)
                store(grad_window, n * dim + i, grad)


@compiled
def forward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """forward for all tasks."""
    share(forward, threads, num_tasks, args)


@compiled
def backward_on_team(threads: int, num_tasks: int, args: Any) -> None:
    """backward for all tasks."""
    share(backward, threads, num_tasks, args)
