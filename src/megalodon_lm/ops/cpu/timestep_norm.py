"""Norms over time on the CPU: compiled passes over x, as an operator with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import timestep_norm as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..timestep_norm import NormState, empty_norm_state
from . import timestep_norm_kernels as kernels
from .operators import form, tracked
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
    out_dtype = out_dtype or x.dtype
    entry = empty_norm_state(batch, num_groups) if state is None else state
    lengths = torch.full((batch,), length) if boundaries is None or boundaries.lengths is None else boundaries.lengths
    where = boundaries or Boundaries()
    counts = (where.since_start(entry.count, length) + 1).contiguous()
    bias = bias.float().clone()
    inputs = tuple(
        t.contiguous() for t in (x.float(), weight.float() + 1, bias, entry.mean.double(), entry.var.double())
    )
    settings = (num_groups, eps, *decays, out_dtype, tracked(*inputs))
    run = form(norm_over_time_forward, _forward, *inputs)
    y, mean, var, _ = run(*inputs, counts, lengths.contiguous(), *settings)
    return y, NormState(where.exit_position(entry.count, length), mean, var)


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry_mean: Tensor,
    entry_var: Tensor,
    counts: Tensor,
    lengths: Tensor,
    num_groups: int,
    eps: float,
    mean_decay: float,
    var_decay: float,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, the exit mean and variance (B, G), and what backward needs (B, G, L, 3), L = 0 unless `keep`."""
    batch, length, dim = x.shape
    y = _blank(x, lengths, out_dtype)
    mean, var = entry_mean.new_empty(entry_mean.shape), entry_var.new_empty(entry_var.shape)
    saved = mean.new_empty(batch, num_groups, length if keep else 0, 3)
    inputs = (x, (length, dim, num_groups, keep), weight, bias, eps, (mean_decay, var_decay), entry_mean, entry_var)
    run_on_team(kernels.forward_on_team, batch * num_groups, *inputs, counts, lengths, y, mean, var, saved)
    return y, mean, var, saved


def _blank(x: Tensor, lengths: Tensor, dtype: torch.dtype) -> Tensor:
    """What kernels fill up to the lengths; zero beyond them."""
    full = bool((lengths == x.shape[1]).all())
    return torch.empty(x.shape, dtype=dtype) if full else torch.zeros(x.shape, dtype=dtype)


@torch.library.custom_op("megalodon::norm_over_time_forward", mutates_args=())
def norm_over_time_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry_mean: Tensor,
    entry_var: Tensor,
    counts: Tensor,
    lengths: Tensor,
    num_groups: int,
    eps: float,
    mean_decay: float,
    var_decay: float,
    out_dtype: torch.dtype,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_forward as an operator."""
    tensors = [t.detach() for t in (x, weight, bias, entry_mean, entry_var)]
    return _forward(*tensors, counts, lengths, num_groups, eps, mean_decay, var_decay, out_dtype, keep)


@norm_over_time_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    entry_mean: Tensor,
    entry_var: Tensor,
    counts: Tensor,
    lengths: Tensor,
    num_groups: int,
    eps: float,
    mean_decay: float,
    var_decay: float,
    out_dtype: torch.dtype,
    keep: bool,
) -> Any:
    saved = entry_mean.new_empty(x.shape[0], num_groups, x.shape[1] if keep else 0, 3)
    mean, var = entry_mean.new_empty(entry_mean.shape), entry_var.new_empty(entry_var.shape)
    return x.new_empty(x.shape, dtype=out_dtype), mean, var, saved


@torch.library.custom_op("megalodon::norm_over_time_backward", mutates_args=())
def norm_over_time_backward(
    x: Tensor,
    weight: Tensor,
    entry_mean: Tensor,
    counts: Tensor,
    lengths: Tensor,
    saved: Tensor,
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    mean_decay: float,
    var_decay: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, weight, bias, and the entry mean and variance."""
    batch, length, dim = x.shape
    groups = entry_mean.shape[1]
    grad_x = _blank(x, lengths, x.dtype)
    grad_weight, grad_bias = x.new_empty(batch, dim), x.new_empty(batch, dim)
    to_mean, to_var = grad_mean.new_empty(grad_mean.shape), grad_var.new_empty(grad_var.shape)
    inputs = (x, (length, dim, groups, True), weight, (mean_decay, var_decay), counts, lengths, saved, entry_mean)
    grads = (grad_y, grad_mean, grad_var, grad_x, grad_weight, grad_bias, to_mean, to_var)
    run_on_team(kernels.backward_on_team, batch * groups, *inputs, *grads)
    return grad_x, grad_weight.sum(0), grad_bias.sum(0), to_mean, to_var


@norm_over_time_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    entry_mean: Tensor,
    counts: Tensor,
    lengths: Tensor,
    saved: Tensor,
    grad_y: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    mean_decay: float,
    var_decay: float,
) -> Any:
    return tuple(t.new_empty(t.shape) for t in (x, weight, weight, grad_mean, grad_var))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, weight, _, entry_mean, _, counts, lengths = inputs[:7]
    ctx.save_for_backward(x, weight, entry_mean, counts, lengths, output[3])
    ctx.decays, ctx.out_dtype = inputs[9:11], output[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_mean: Tensor | None, grad_var: Tensor | None, _: None) -> Any:
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no second time
    x, entry_mean = saved[0], saved[2]
    grad_y = x.new_zeros(x.shape, dtype=ctx.out_dtype) if grad_y is None else grad_y.contiguous()
    moments = (entry_mean.new_zeros(entry_mean.shape) if g is None else g.contiguous() for g in (grad_mean, grad_var))
    grads = norm_over_time_backward(*saved, grad_y, *moments, *ctx.decays)
    return *grads, *([None] * 8)


norm_over_time_forward.register_autograd(_backward, setup_context=_save)
