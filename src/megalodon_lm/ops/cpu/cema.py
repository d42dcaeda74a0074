"""CEMA on the CPU: the recurrence in compiled code, as an operator with fake and autograd."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import cema as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..derived import derived
from . import cema_kernels as kernels
from .cema_step import step
from .operators import form, tracked
from .strips import CHANNELS, TOKENS, plan
from .team import run_on_team


def _fits(x: Tensor, p: Tensor, *_: Any, **__: Any) -> bool:
    return p.dtype == torch.float32


@implements(portable.cema, "cpu", _fits)
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
    batch, length, dim = x.shape
    omega = omega.to(p.dtype)
    starts, lengths = (None, None) if boundaries is None else (boundaries.starts, boundaries.lengths)
    given = (x, p, q, g, omega, state)
    run = form(cema_forward, _forward, *given)
    if length == 1 and run is _forward:
        return step(x, p, q, g, omega.clone(), state, starts, lengths)
    entry = p.new_zeros(batch, dim, p.shape[1], 2) if state is None else state.to(p.dtype)
    coefficients, direct = derived(pack, p, q, g), derived(fill_up, omega)
    y, leaving, _ = run(x.contiguous(), coefficients, direct, entry.contiguous(), starts, lengths, tracked(*given))
    return y, leaving


def pack(p: Tensor, q: Tensor, g: Tensor) -> Tensor:
    """Coefficients as the kernels read them: (C, N', 5, CHANNELS), N' even, zero beyond D and N."""
    dim, ndim = p.shape
    parts = F.pad(torch.stack([q.real, q.imag, p, g.real, g.imag]), (0, ndim % 2, 0, -dim % CHANNELS))
    return parts.view(5, -1, CHANNELS, parts.shape[-1]).permute(1, 3, 0, 2).contiguous()


def fill_up(omega: Tensor) -> Tensor:
    """(C, CHANNELS), zero beyond D, in memory of its own: see simd.as_numpy."""
    return F.pad(omega, (0, -len(omega) % CHANNELS)).reshape(-1, CHANNELS).clone(memory_format=torch.contiguous_format)


def _saved_shape(x: Tensor, coefficients: Tensor, keep: bool) -> tuple[int, ...]:
    """(B, C, K, N', 2, CHANNELS)."""
    parts, ndim = coefficients.shape[:2]
    return x.shape[0], parts, -(-x.shape[1] // TOKENS) if keep else 0, ndim, 2, CHANNELS


def _forward(
    x: Tensor,
    coefficients: Tensor,
    omega: Tensor,
    entry: Tensor,
    starts: Tensor | None,
    lengths: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D), the exit state (B, D, N, 2) and the saved states, none unless `keep`."""
    batch, length, dim = x.shape
    y = (x.new_empty if lengths is None else x.new_zeros)(x.shape)
    leaving = entry.new_empty(entry.shape)
    every_slot = starts is None and lengths is None
    saved = (entry.new_empty if every_slot else entry.new_zeros)(_saved_shape(x, coefficients, keep))
    shape = (length, dim, entry.shape[2], saved.shape[2])
    inputs = (x, shape, coefficients, omega, entry, *plan(batch, length, starts, lengths))
    run_on_team(kernels.forward, batch * len(omega), *inputs, y, leaving, saved)
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
    """_forward as an operator, for contiguous tensors."""
    return _forward(x, coefficients, omega, entry, starts, lengths, keep)


@cema_forward.register_fake
def _(x: Tensor, coefficients: Tensor, omega: Tensor, entry: Tensor, starts: Any, lengths: Any, keep: bool) -> Any:
    return x.new_empty(x.shape), entry.new_empty(entry.shape), entry.new_empty(_saved_shape(x, coefficients, keep))


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
    """Gradients to x, coefficients, omega and the entry state; rows are summed in order."""
    batch, length, dim = x.shape
    grad_x = (x.new_empty if lengths is None else x.new_zeros)(x.shape)
    grad_coefficients = coefficients.new_empty(batch, *coefficients.shape)
    grad_omega = omega.new_empty(batch, *omega.shape)
    grad_entry = grad_leaving.new_empty(grad_leaving.shape)
    shape = (length, dim, grad_leaving.shape[2], saved.shape[2])
    inputs = (x, shape, coefficients, omega, saved, *plan(batch, length, starts, lengths))
    grads = (grad_y, grad_leaving, grad_x, grad_coefficients, grad_omega, grad_entry)
    run_on_team(kernels.backward, batch * len(omega), *inputs, *grads)
    return grad_x, grad_coefficients.sum(0), grad_omega.sum(0), grad_entry


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
    return tuple(t.new_empty(t.shape) for t in (x, coefficients, omega, grad_leaving))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    x, coefficients, omega, _, starts, lengths, _ = inputs
    ctx.save_for_backward(x, coefficients, omega, output[2], starts, lengths)
    ctx.state_shape = output[1].shape
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_leaving: Tensor | None, _: None) -> Any:
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no second time
    x, coefficients = saved[:2]
    grad_y = x.new_zeros(x.shape) if grad_y is None else grad_y.contiguous()
    grad_leaving = coefficients.new_zeros(ctx.state_shape) if grad_leaving is None else grad_leaving.contiguous()
    grads = cema_backward(*saved, grad_y, grad_leaving)
    return *grads, None, None, None


cema_forward.register_autograd(_backward, setup_context=_save)
