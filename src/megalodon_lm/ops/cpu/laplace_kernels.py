"""The Laplace function of scores, and its slope. All arrays are flat."""

from typing import Any

import numpy as np

from .simd import LANES, add_product, compiled, exp, inner, load, normal_integral, splat, store
from .team import share


@inner
def _stretch_of(task: int, size: int, stretches: int, stretch: int) -> tuple[int, int, int]:
    """Which part of `size` elements a task is of, and from where to where; the last one of a part takes the rest."""
    part, number = task // stretches, task % stretches
    begin = part * size + number * stretch
    return part, begin, (part + 1) * size if number == stretches - 1 else begin + stretch


@inner
def _forward(
    first: int, last: int, size: int, stretches: int, stretch: int, shift: Any, factors: Any, scores: Any, y: Any
) -> None:
    """Stretches first..last of parts of `size` elements, 16 or more: y = 0.5 (1 + erf(factor score + shift))."""
    for task in range(first, last):
        part, begin, end = _stretch_of(task, size, stretches, stretch)
        factor, by = splat(factors[part]), splat(shift)
        for start in range(begin, end, LANES):
            i = min(start, end - LANES)  # the last ones may come twice
            store(y, i, normal_integral(add_product(by, load(scores, i), factor)))


@inner
def _backward(
    first: int,
    last: int,
    size: int,
    stretches: int,
    stretch: int,
    shift: Any,
    factors: Any,
    scores: Any,
    grad_y: Any,
    grad: Any,
) -> None:
    """Gradients of _forward to the scores."""
    slope, none = splat(np.float32(1 / np.sqrt(np.pi))), splat(np.float32(0))
    for task in range(first, last):
        part, begin, end = _stretch_of(task, size, stretches, stretch)
        factor, by = splat(factors[part]), splat(shift)
        for start in range(begin, end, LANES):
            i = min(start, end - LANES)
            z = add_product(by, load(scores, i), factor)
            store(grad, i, load(grad_y, i) * exp(none - z * z) * (slope * factor))


@compiled
def forward(threads: int, num_tasks: int, args: Any) -> None:
    """y for all stretches: size, stretches, stretch, shift, factors, scores; out: y."""
    share(_forward, threads, num_tasks, args)


@compiled
def backward(threads: int, num_tasks: int, args: Any) -> None:
    """Gradients: size, stretches, stretch, shift, factors, scores, grad_y; out: grad."""
    share(_backward, threads, num_tasks, args)
