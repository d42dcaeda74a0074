"""CEMA for one token without gradients, as in generation: states are read and written as they lie, one by one."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .scalars import as_float, rounded
from .simd import as_numpy, compiled, inner
from .team import num_threads, share

_FEW_STATES = 1 << 16  # no more are worth waking another thread for


@inner(fastmath={"contract", "reassoc", "nsz"})
def _step_channels(
    first: int,
    last: int,
    x: Any,
    p: Any,
    q: Any,
    g: Any,
    omega: Any,
    entry: Any,
    starts: Any,
    lengths: Any,
    y: Any,
    leaving: Any,
) -> None:
    dim, ndim = p.shape
    nothing = np.zeros((ndim, 2), np.float32)
    for task in range(first, last):
        b, d = task // dim, task % dim
        if lengths[b] == 0:
            y[task] = 0
            for n in range(ndim):
                leaving[task, n, 0] = entry[task, n, 0]
                leaving[task, n, 1] = entry[task, n, 1]
            continue
        u = as_float(x[task])
        before = nothing if starts[b] else entry[task]
        total = np.float32(0)
        for n in range(ndim):
            real = q[d, n, 0] * before[n, 0] - q[d, n, 1] * before[n, 1] + p[d, n] * u
            imag = q[d, n, 0] * before[n, 1] + q[d, n, 1] * before[n, 0]
            leaving[task, n, 0] = real
            leaving[task, n, 1] = imag
            total += g[d, n, 0] * real - g[d, n, 1] * imag
        y[task] = rounded(total + omega[d] * u, y)


@compiled
def _step(threads: int, num_tasks: int, args: Any) -> None:
    share(_step_channels, threads, num_tasks, args)


def step(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    g: Tensor,
    omega: Tensor,
    state: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """As megalodon_lm.ops.cema.cema for x (B, 1, D), with the two fields of its boundaries."""
    batch, _, dim = x.shape
    ndim = p.shape[1]
    entry = torch.zeros(batch, dim, ndim, 2) if state is None else state
    y, leaving = torch.empty(x.shape, dtype=x.dtype), torch.empty(batch, dim, ndim, 2)
    began = np.zeros(batch, np.bool_) if starts is None else as_numpy(starts.contiguous()).reshape(-1)
    valid = np.ones(batch, np.int64) if lengths is None else as_numpy(lengths.contiguous())
    coefficients = (as_numpy(t.contiguous()) for t in (p, torch.view_as_real(q), torch.view_as_real(g), omega))
    states = (as_numpy(t).reshape(-1, ndim, 2) for t in (entry.contiguous(), leaving))
    threads = num_threads() if batch * dim * ndim > _FEW_STATES else 1
    before, after = states
    args = (as_numpy(x.contiguous()).reshape(-1), *coefficients, before, began, valid, as_numpy(y).reshape(-1), after)
    _step(threads, batch * dim, args)
    return y, leaving
