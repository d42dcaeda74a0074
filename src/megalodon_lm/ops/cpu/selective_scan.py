"""The selective scan on the CPU: the recurrence in compiled code, as an operator with fake and autograd."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import selective_scan as portable
from ..backend import implements
from ..boundaries import Boundaries
from . import selective_scan_kernels as kernels
from .operators import form, tracked
from .strips import CHANNELS, TOKENS, plan
from .team import run_on_team


def _fits(x: Tensor, dt: Tensor, a: Tensor, *_: Any, **__: Any) -> bool:
    return dt.dtype != torch.float64 and a.dtype != torch.float64


@implements(portable.selective_scan, "cpu", _fits)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """As megalodon_lm.ops.selective_scan.selective_scan, for float32 and bf16."""
    given = (x, dt, a, b, c, skip, state)
    wide = dt.float(), a.float(), skip.float()
    entry = wide[1].new_zeros(len(x), *a.shape) if state is None else state.float()
    starts, lengths = (None, None) if boundaries is None else (boundaries.starts, boundaries.lengths)
    run = form(selective_scan_forward, _forward, *given)
    tokens, shared = (x.contiguous(), wide[0].contiguous()), (b.contiguous(), c.contiguous())
    direct = F.pad(wide[2], (0, -a.shape[0] % CHANNELS)).view(-1, CHANNELS)
    y, leaving, _ = run(*tokens, pack(wide[1]), *shared, direct, entry.contiguous(), starts, lengths, tracked(*given))
    return y, leaving


def pack(a: Tensor) -> Tensor:
    """(D, N) as the kernels read it: (C, N', CHANNELS), N' even, zero beyond D and N."""
    dim, ndim = a.shape
    a = F.pad(a, (0, ndim % 2, 0, -dim % CHANNELS))
    return a.view(-1, CHANNELS, a.shape[1]).transpose(1, 2).contiguous()


def _saved_shape(x: Tensor, rates: Tensor, keep: bool) -> tuple[int, ...]:
    """(B, C, K, N', CHANNELS)."""
    parts, even, channels = rates.shape
    return x.shape[0], parts, -(-x.shape[1] // TOKENS) if keep else 0, even, channels


def _forward(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    entry: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), the exit state (B, D, N) and the saved states, none unless `keep`."""
    batch, length, dim = x.shape
    y = (x.new_empty if lengths is None else x.new_zeros)(x.shape)
    leaving = entry.new_empty(entry.shape)
    every_slot = starts is None and lengths is None
    saved = (entry.new_empty if every_slot else entry.new_zeros)(_saved_shape(x, rates, keep))
    shape = (length, dim, entry.shape[2], saved.shape[2])
    inputs = (x, dt, shape, rates, b, c, skip, entry, *plan(batch, length, starts, lengths))
    run_on_team(kernels.forward, batch * len(skip), *inputs, y, leaving, saved)
    return y, leaving, saved


@torch.library.custom_op("megalodon::selective_scan_forward", mutates_args=())
def selective_scan_forward(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    entry: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """_forward as an operator, for contiguous tensors."""
    return _forward(x, dt, rates, b, c, skip, entry, starts, lengths, keep)


@selective_scan_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    b: Any,
    c: Any,
    skip: Any,
    entry: Tensor,
    starts: Any,
    lengths: Any,
    keep: bool,
) -> Any:
    return x.new_empty(x.shape), entry.new_empty(entry.shape), entry.new_empty(_saved_shape(x, rates, keep))


@torch.library.custom_op("megalodon::selective_scan_backward", mutates_args=())
def selective_scan_backward(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    saved: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    grad_y: Tensor,
    grad_leaving: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to x, dt, rates, b, c, skip and the entry state; rows and channels are summed in order."""
    batch, length, dim = x.shape
    ndim = b.shape[2]
    new = torch.empty if lengths is None else torch.zeros
    grad_x, grad_dt = (new(t.shape, dtype=t.dtype) for t in (x, dt))
    grad_rates, grad_skip = rates.new_empty(batch, *rates.shape), skip.new_empty(batch, *skip.shape)
    grad_b, grad_c = (rates.new_zeros(batch, *rates.shape[:2], length) for _ in range(2))
    grad_entry = grad_leaving.new_empty(grad_leaving.shape)
    shape = (length, dim, ndim, saved.shape[2])
    inputs = (x, dt, shape, rates, b, c, skip, saved, *plan(batch, length, starts, lengths))
    grads = (grad_y, grad_leaving, grad_x, grad_dt, grad_rates, grad_b, grad_c, grad_skip, grad_entry)
    run_on_team(kernels.backward, batch * len(skip), *inputs, *grads)
    to_b, to_c = (g.sum(1)[:, :ndim].transpose(1, 2).to(t.dtype) for g, t in ((grad_b, b), (grad_c, c)))
    return grad_x, grad_dt, grad_rates.sum(0), to_b.contiguous(), to_c.contiguous(), grad_skip.sum(0), grad_entry


@selective_scan_backward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    rates: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    saved: Tensor,
    starts: Any,
    lengths: Any,
    grad_y: Tensor,
    grad_leaving: Tensor,
) -> Any:
    return tuple(t.new_empty(t.shape) for t in (x, dt, rates, b, c, skip, grad_leaving))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    *tensors, _, starts, lengths, _ = inputs
    ctx.save_for_backward(*tensors, output[2], starts, lengths)
    ctx.state_shape = output[1].shape
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_leaving: Tensor | None, _: None) -> Any:
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no second time
    x, _, rates = saved[:3]
    grad_y = x.new_zeros(x.shape) if grad_y is None else grad_y.contiguous()
    grad_leaving = rates.new_zeros(ctx.state_shape) if grad_leaving is None else grad_leaving.contiguous()
    return *selective_scan_backward(*saved, grad_y, grad_leaving), None, None, None


selective_scan_forward.register_autograd(_backward, setup_context=_save)
