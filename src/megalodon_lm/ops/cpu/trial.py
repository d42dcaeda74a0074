"""The smallest kernel with what all others are made of, vectors and threads: whether any can work on this machine."""

from typing import Any

import torch

from ..backend import KernelError
from .simd import LANES, compiled, inner, load, store
from .team import run_on_team, share


@inner
def _double(first: int, last: int, x: Any) -> None:
    for i in range(first * LANES, last * LANES, LANES):
        store(x, i, load(x, i) + load(x, i))


@compiled
def _double_on_team(threads: int, num_tasks: int, args: Any) -> None:
    share(_double, threads, num_tasks, args)


def double() -> None:
    """Double a few numbers.

    Raises:
        KernelError: it cannot be compiled, or computes something else.
    """
    x = torch.ones(4 * LANES)
    run_on_team(_double_on_team, 4, x)
    if not bool((x == 2).all()):
        raise KernelError("kernels compute wrongly")
