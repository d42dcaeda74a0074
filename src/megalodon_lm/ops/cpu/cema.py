"""CEMA on the CPU: the recurrence in compiled code, as an operator with fake and autograd."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..boundaries import Boundaries
from . import cema_kernels as kernels
from .simd import as_numpy
from .team import run_on_team


def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    g: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """As megalodon_lm.ops.cema.cema, for x in float32 or bf16 and coefficients in float32."""
    batch, _, dim = x.shape
    ndim = p.shape[1]
    blocks = -(-dim // kernels.WIDTH)
    missing = blocks * kernels.WIDTH - dim
    parts = torch.stack([q.real, q.imag, p, g.real, g.imag])  # (5, D, N)
    coefficients = (
        F.pad(parts, (0, 0, 0, missing)).view(5, blocks, kernels.WIDTH, ndim).permute(1, 3, 0, 2).contiguous()
    )
    direct = F.pad(omega.to(p.dtype), (0, missing)).view(blocks, kernels.WIDTH)
    entry = x.new_zeros(batch, dim, ndim, 2, dtype=p.dtype) if state is None else state.contiguous()
    starts = None if boundaries is None else boundaries.starts
    lengths = None if boundaries is None else boundaries.lengths
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (x, coefficients, direct, entry))
    run = cema_forward if keep or torch.compiler.is_compiling() else _forward
    y, leaving, _ = run(x.contiguous(), coefficients, direct, entry, starts, lengths, keep)
    return y, leaving


def _plan(batch: int, length: int, starts: Tensor | None, lengths: Tensor | None) -> tuple[np.ndarray, ...]:
    """edges, resets and counts of plan_blocks."""
    most = -(-length // kernels.TOKENS) + (0 if starts is None else int(starts.sum(1).max()))
    edges = np.empty((batch, most + 1), np.int64)
    resets = np.empty((batch, most), np.bool_)
    counts = np.empty(batch, np.int64)
    where = np.zeros((batch, 0), np.bool_) if starts is None else starts.numpy()
    valid = np.full(batch, length) if lengths is None else lengths.numpy()
    kernels.plan_blocks(where, valid, edges, resets, counts)
    return edges, resets, counts


def _forward(
    x: Tensor,
    coefficients: Tensor,
    omega: Tensor,
    entry: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), the exit state (B, D, N, 2) and the saved states (B, C, M, N, 2, WIDTH), M = 0 unless `keep`."""
    batch, length, dim = x.shape
    blocks, ndim = coefficients.shape[:2]
    edges, resets, counts = _plan(batch, length, starts, lengths)
    y = torch.empty_like(x) if lengths is None else torch.zeros_like(x)
    leaving = torch.empty_like(entry)
    saved = entry.new_empty(batch, blocks, resets.shape[1] if keep else 0, ndim, 2, kernels.WIDTH)
    shape = (length, dim, ndim, saved.shape[2])
    inputs = (as_numpy(x), shape, as_numpy(coefficients), as_numpy(omega), as_numpy(entry), edges, resets, counts)
    run_on_team(kernels.forward_on_team, batch * blocks, *inputs, as_numpy(y), as_numpy(leaving), as_numpy(saved))
    return y, leaving, saved


@torch.library.custom_op("megalodon::cema_forward", mutates_args=())
def cema_forward(
    x: Tensor,
    coefficients: Tensor,
    omega: Tensor,
    entry: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """_forward as an operator; coefficients (C, N, 5, WIDTH), omega (C, WIDTH)."""
    return _forward(x.detach(), coefficients.detach(), omega.detach(), entry.detach(), starts, lengths, keep)


@cema_forward.register_fake
def _(x: Tensor, coefficients: Tensor, omega: Tensor, entry: Tensor, starts: Any, lengths: Any, keep: bool) -> Any:
    blocks, ndim = coefficients.shape[:2]
    if starts is None:
        most: Any = -(-x.shape[1] // kernels.TOKENS)
    else:
        most = torch.library.get_ctx().new_dynamic_size()
    saved = entry.new_empty(x.shape[0], blocks, most if keep else 0, ndim, 2, kernels.WIDTH)
    return torch.empty_like(x), torch.empty_like(entry), saved


@torch.library.custom_op("megalodon::cema_backward", mutates_args=())
def cema_backward(
    x: Tensor,
    coefficients: Tensor,
    omega: Tensor,
    saved: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    grad_y: Tensor,
    grad_leaving: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, coefficients, omega and the entry state."""
    batch, length, dim = x.shape
    blocks, ndim = coefficients.shape[:2]
    plan = _plan(batch, length, starts, lengths)
    grad_x = torch.empty_like(x) if lengths is None else torch.zeros_like(x)
    grad_c = coefficients.new_empty(batch, *coefficients.shape)
    grad_o = omega.new_empty(batch, *omega.shape)
    grad_entry = torch.empty_like(grad_leaving)
    shape = (length, dim, ndim, saved.shape[2])
    inputs = (as_numpy(x), shape, as_numpy(coefficients), as_numpy(omega), as_numpy(saved), *plan)
    grads = [as_numpy(t) for t in (grad_y.to(x.dtype), grad_leaving, grad_x, grad_c, grad_o, grad_entry)]
    run_on_team(kernels.backward_on_team, batch * blocks, *inputs, *grads)
    return grad_x, grad_c.sum(0), grad_o.sum(0), grad_entry


@cema_backward.register_fake
def _(
    x: Tensor,
    coefficients: Tensor,
    omega: Tensor,
    saved: Tensor,
    starts: Any,
    lengths: Any,
    grad_y: Tensor,
    grad_leaving: Tensor,
) -> Any:
    return tuple(torch.empty_like(t) for t in (x, coefficients, omega, grad_leaving))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, coefficients, omega, _, starts, lengths, _ = inputs
    ctx.save_for_backward(x, coefficients, omega, output[2], starts, lengths)


def _backward(ctx: Any, grad_y: Tensor, grad_leaving: Tensor, _: Tensor) -> Any:
    grads = cema_backward(*ctx.saved_tensors, grad_y.contiguous(), grad_leaving.contiguous())
    return *grads, None, None, None


cema_forward.register_autograd(_backward, setup_context=_save)
