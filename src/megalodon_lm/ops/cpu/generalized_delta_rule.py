"""The generalised delta rule on the CPU: the recurrence in compiled code, as an operator with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import generalized_delta_rule as portable
from ..backend import implements
from ..boundaries import Boundaries
from . import delta_rule_kernels as kernels
from .operators import form, tracked
from .simd import LANES
from .team import run_on_team
from .token_shift import where


def _fits(r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, *rest: Any, **__: Any) -> bool:
    wide = all(t.dtype in (torch.float32, torch.bfloat16) for t in (log_w, k, v))
    return wide and k.shape[-1] % LANES == 0 and v.shape[-1] % kernels.PAIR == 0


@implements(portable.generalized_delta_rule, "cpu", _fits)
def generalized_delta_rule(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """As megalodon_lm.ops.generalized_delta_rule, in float32: K a multiple of 16, V of 32, and any decay."""
    batch, _, heads, width = k.shape
    shape = batch, heads, width, v.shape[-1]
    entry = k.new_zeros(shape, dtype=torch.float32) if state is None else state.float().contiguous()
    starts = lengths = None
    if boundaries is not None:
        starts, lengths = boundaries.starts, boundaries.lengths
    inputs = [t.float().contiguous() for t in (r, log_w.float().exp(), k, v, a, b)]
    run = form(delta_rule_forward, _forward, *inputs, entry)
    y, leaving, *_ = run(*inputs, entry, starts, lengths, tracked(*inputs, entry))
    return y.to(r.dtype), leaving


def _forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    entry: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (B, L, H, V), the exit matrices (B, H, K, V) and what is kept for backward; see kernels.forward."""
    batch, length, heads, width = k.shape
    saved, asked = (v.new_empty(shape) for shape in _kept_shapes(k, v, keep))
    y = (v.new_empty if lengths is None else v.new_zeros)(v.shape)
    leaving = torch.empty_like(entry)
    shape = (length, heads, width, v.shape[-1], saved.shape[2])
    inputs = (r, w, k, v, a, b, entry, *where(k, starts, lengths))
    run_on_team(kernels.forward, batch * heads, shape, *inputs, y, leaving, saved, asked)
    return y, leaving, saved, asked


def _kept_shapes(k: Tensor, v: Tensor, keep: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of `saved` and `asked`."""
    batch, length, heads, width = k.shape
    chunks = -(-length // kernels.CHUNK) if keep else 0
    return (batch, heads, chunks, width, v.shape[-1]), (batch, length if keep else 0, heads, v.shape[-1])


@torch.library.custom_op("megalodon::delta_rule_forward", mutates_args=())
def delta_rule_forward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    entry: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """_forward as an operator, for contiguous tensors."""
    return _forward(r, w, k, v, a, b, entry, starts, lengths, keep)


@delta_rule_forward.register_fake
def _(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    entry: Tensor,
    starts: Any,
    lengths: Any,
    keep: bool,
) -> Any:
    return v.new_empty(v.shape), entry.new_empty(entry.shape), *(v.new_empty(s) for s in _kept_shapes(k, v, keep))


@torch.library.custom_op("megalodon::delta_rule_backward", mutates_args=())
def delta_rule_backward(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    saved: Tensor,
    asked: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    dy: Tensor,
    dleaving: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to r, w, k, v, a, b and the entry matrices, whose gradients are (B, H, V, K)."""
    batch, length, heads, width = k.shape
    grads = [(t.new_empty if lengths is None else t.new_zeros)(t.shape) for t in (r, w, k, v, a, b)]
    dentry = torch.empty_like(dleaving)
    shape = (length, heads, width, v.shape[-1], saved.shape[2])
    inputs = (r, w, k, v, a, b, saved, asked, *where(k, starts, lengths), dy, dleaving)
    run_on_team(kernels.backward, batch * heads, shape, *inputs, *grads, dentry)
    dr, dw, dk, dv, da, db = grads
    return dr, dw, dk, dv, da, db, dentry


@delta_rule_backward.register_fake
def _(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    saved: Tensor,
    asked: Tensor,
    starts: Any,
    lengths: Any,
    dy: Tensor,
    dleaving: Tensor,
) -> Any:
    return tuple(t.new_empty(t.shape) for t in (r, w, k, v, a, b, dleaving))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, starts, lengths, _ = inputs
    ctx.save_for_backward(*tensors, *output[2:], starts, lengths)
    ctx.matrix_shape = output[1].mT.shape
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor | None, dleaving: Tensor | None, *_: None) -> Any:
    saved = ctx.saved_tensors
    v = saved[3]
    dy = v.new_zeros(v.shape) if dy is None else dy.contiguous()
    dleaving = v.new_zeros(ctx.matrix_shape) if dleaving is None else dleaving.mT.contiguous()
    *grads, dentry = delta_rule_backward(*saved, dy, dleaving)
    return *grads, dentry.mT, None, None, None


delta_rule_forward.register_autograd(_backward, setup_context=_save)
