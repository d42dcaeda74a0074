"""Token shift on the CPU: one compiled pass each way, as an operator with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import token_shift as portable
from ..backend import implements
from ..boundaries import Boundaries
from . import token_shift_kernels as kernels
from .operators import form
from .simd import LANES
from .team import run_on_team


def _fits(x: Tensor, mix: Tensor, *_: Any, **__: Any) -> bool:
    return x.shape[-1] % LANES == 0 and mix.dtype in (torch.float32, torch.bfloat16)


@implements(portable.token_shift, "cpu", _fits)
def token_shift(
    x: Tensor, mix: Tensor, state: Tensor | None = None, boundaries: Boundaries | None = None
) -> tuple[Tensor, Tensor]:
    """As megalodon_lm.ops.token_shift.token_shift, for D a multiple of 16."""
    entry = portable.entry_token(x, state)
    starts, lengths = (None, None) if boundaries is None else (boundaries.starts, boundaries.lengths)
    given = x.contiguous(), mix.float(), entry.contiguous()
    y = form(token_shift_forward, _forward, *given)(*given, starts, lengths)
    return y, portable.last_token(x, entry, boundaries)


def where(x: Tensor, starts: Tensor | None, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Starts (B, L) and lengths (B,), of a piece that has none too."""
    batch, length = x.shape[:2]
    return (
        torch.zeros(batch, length, dtype=torch.bool) if starts is None else starts.contiguous(),
        torch.full((batch,), length) if lengths is None else lengths.contiguous(),
    )


def _tasks(x: Tensor) -> int:
    return len(x) * x.shape[-1] // LANES


def _forward(x: Tensor, mix: Tensor, entry: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    y = (x.new_empty if lengths is None else x.new_zeros)(len(mix), *x.shape)
    run_on_team(kernels.forward, _tasks(x), (*x.shape, len(mix)), x, mix, entry, *where(x, starts, lengths), y)
    return y


@torch.library.custom_op("megalodon::token_shift_forward", mutates_args=())
def token_shift_forward(x: Tensor, mix: Tensor, entry: Tensor, starts: Tensor | None, lengths: Tensor | None) -> Tensor:
    """_forward as an operator, for contiguous tensors."""
    return _forward(x, mix, entry, starts, lengths)


@token_shift_forward.register_fake
def _(x: Tensor, mix: Tensor, entry: Tensor, starts: Any, lengths: Any) -> Tensor:
    return x.new_empty(len(mix), *x.shape)


@torch.library.custom_op("megalodon::token_shift_backward", mutates_args=())
def token_shift_backward(
    x: Tensor, mix: Tensor, entry: Tensor, starts: Tensor | None, lengths: Tensor | None, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, mix and the entry token; rows are summed in order."""
    dx = (x.new_empty if lengths is None else x.new_zeros)(x.shape)
    dmix, dentry = mix.new_empty(len(x), *mix.shape), entry.new_empty(entry.shape)
    inputs = (x, mix, entry, *where(x, starts, lengths), dy)
    run_on_team(kernels.backward, _tasks(x), (*x.shape, len(mix)), *inputs, dx, dmix, dentry)
    return dx, dmix.sum(0), dentry


@token_shift_backward.register_fake
def _(x: Tensor, mix: Tensor, entry: Tensor, starts: Any, lengths: Any, dy: Tensor) -> Any:
    return tuple(t.new_empty(t.shape) for t in (x, mix, entry))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> Any:
    return *token_shift_backward(*ctx.saved_tensors, dy.contiguous()), None, None


token_shift_forward.register_autograd(_backward, setup_context=_save)
