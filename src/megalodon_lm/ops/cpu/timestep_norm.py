"""Norms over time on the CPU: compiled passes over x, as an operator with fake and autograd."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import timestep_norm as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..derived import derived
from ..timestep_norm import NormState
from . import timestep_norm_kernels as kernels
from .norms import SUMMED_TOKENS, affine
from .operators import form
from .team import run_on_team


@implements(portable.timestep_norm, "cpu")
def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    boundaries: Boundaries | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, NormState]:
    """As megalodon_lm.ops.timestep_norm.timestep_norm, for x in float32 or bf16."""
    return norm_over_time(kernels.CUMULATIVE, x, weight, bias, num_groups, eps, state, boundaries, out_dtype)


def norm_over_time(
    decays: tuple[float, float],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float,
    state: NormState | None,
    boundaries: Boundaries | None,
    out_dtype: torch.dtype | None,
) -> tuple[Tensor, NormState]:
    """timestep_norm or decay_norm, told by the decays; see timestep_norm_kernels."""
    batch, length, _ = x.shape
    out_dtype, where = out_dtype or x.dtype, boundaries or Boundaries()
    count, *entry = (None, None, None) if state is None else state
    maps = derived(affine, weight, bias)
    inputs = x.float().contiguous(), *maps, *(None if t is None else t.double().contiguous() for t in entry)
    run = form(norm_over_time_forward, _forward, *inputs)
    y, mean, var, _ = run(*inputs, count, where.starts, where.lengths, num_groups, eps, *decays, out_dtype)
    entered = torch.zeros(batch, dtype=torch.int64) if count is None else count
    return y, NormState(where.exit_position(entered, length), mean, var)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry_mean: Tensor | None,
    entry_var: Tensor | None,
    count: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    num_groups: int,
    eps: float,
    mean_decay: float,
    var_decay: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the exit mean and variance (B, G), and what backward needs, (B, L, 3, G)."""
    batch, length, dim = x.shape
    mean, var = (torch.empty(batch, num_groups, dtype=torch.float64) for _ in range(2))
    moments = _blank((batch, length, 3, num_groups), lengths, torch.float64)
    inputs = (x, (length, dim, num_groups), weight, bias, eps, (mean_decay, var_decay))
    entry = (np.zeros(mean.numel()) if t is None else t for t in (entry_mean, entry_var))
    y = _blank(x.shape, lengths, out_dtype)
    places = _places(x, count, starts, lengths)
    run_on_team(kernels.forward_on_team, batch * length, *inputs, *entry, *places, y, mean, var, moments)
    return y, mean, var, moments


def _places(x: Tensor, count: Tensor | None, starts: Tensor | None, lengths: Tensor | None) -> tuple[Any, Any, Any]:
    """Tokens before the piece, document starts and lengths as the kernels take them."""
    batch, length, _ = x.shape
    return (
        np.zeros(batch, np.int64) if count is None else count.contiguous(),
        np.zeros(0, np.bool_) if starts is None else starts.contiguous(),
        np.full(batch, length) if lengths is None else lengths.contiguous(),
    )


def _blank(shape: tuple[int, ...], lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What kernels fill up to the lengths; zero beyond them."""
    return (torch.empty if lengths is None else torch.zeros)(shape, dtype=dtype)


@torch.library.custom_op("megalodon::norm_over_time_forward", mutates_args=())
def norm_over_time_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry_mean: Tensor | None,
    entry_var: Tensor | None,
    count: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    num_groups: int,
    eps: float,
    mean_decay: float,
    var_decay: float,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_forward as an operator."""
    tensors = [None if t is None else t.detach() for t in (x, weight, bias, entry_mean, entry_var)]
    places = (count, starts, lengths)
    return _forward(*tensors, *places, num_groups, eps, mean_decay, var_decay, out_dtype)


@norm_over_time_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry_mean: Any,
    entry_var: Any,
    count: Any,
    starts: Any,
    lengths: Any,
    num_groups: int,
    eps: float,
    mean_decay: float,
    var_decay: float,
    out_dtype: torch.dtype,
) -> Any:
    moments = x.new_empty(*x.shape[:2], 3, num_groups, dtype=torch.float64)
    mean, var = (moments.new_empty(len(x), num_groups) for _ in range(2))
    return x.new_empty(x.shape, dtype=out_dtype), mean, var, moments


@torch.library.custom_op("megalodon::norm_over_time_backward", mutates_args=())
def norm_over_time_backward(
    x: Tensor,
    weight: Tensor,
    entry_mean: Tensor | None,
    count: Tensor | None,
    starts: Tensor | None,
    lengths: Tensor | None,
    moments: Tensor,
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    mean_decay: float,
    var_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias, and the entry mean and variance."""
    batch, length, dim = x.shape
    groups = grad_mean.shape[1]
    grad_x = _blank(x.shape, lengths, x.dtype)
    stretches = -(-batch * length // SUMMED_TOKENS)
    grad_weight, grad_bias = x.new_empty(stretches, dim), x.new_empty(stretches, dim)
    to_mean, to_var = grad_mean.new_empty(grad_mean.shape), grad_var.new_empty(grad_var.shape)
    entry = np.zeros(grad_mean.numel()) if entry_mean is None else entry_mean
    inputs = (x, (length, dim, groups), weight, (mean_decay, var_decay), *_places(x, count, starts, lengths), entry)
    grads = (grad_y, grad_mean, grad_var, moments.new_empty(batch, length, 2, groups))
    results = (grad_x, grad_weight, grad_bias, to_mean, to_var)
    run_on_team(kernels.backward_on_team, batch * length, SUMMED_TOKENS, *inputs, moments, *grads, *results)
    return grad_x, grad_weight.sum(0), grad_bias.sum(0), to_mean, to_var


@norm_over_time_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    entry_mean: Any,
    count: Any,
    starts: Any,
    lengths: Any,
    moments: Tensor,
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    mean_decay: float,
    var_decay: float,
) -> Any:
    return tuple(t.new_empty(t.shape) for t in (x, weight, weight, grad_mean, grad_var))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, entry_mean, _, *places = inputs[:8]
    ctx.save_for_backward(x, weight, entry_mean, *places, output[3])
    ctx.decays, ctx.out_dtype = inputs[10:12], output[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, _: None) -> Any:
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no second time
    x, entry_mean, moments = saved[0], saved[2], saved[-1]
    grad_y = x.new_zeros(x.shape, dtype=ctx.out_dtype) if grad_y is None else grad_y.contiguous()
    statistics = len(x), moments.shape[-1]
    exits = (moments.new_zeros(statistics) if g is None else g.contiguous() for g in (grad_mean, grad_var))
    *grads, to_mean, to_var = norm_over_time_backward(*saved, grad_y, *exits, *ctx.decays)
    to_entry = (None, None) if entry_mean is None else (to_mean, to_var)
    return *grads, *to_entry, *([None] * 8)


norm_over_time_forward.register_autograd(_backward, setup_context=_save)
