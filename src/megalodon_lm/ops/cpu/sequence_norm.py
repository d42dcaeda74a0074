"""SequenceNorm of each feature by itself on the CPU, as an operator with fake and autograd."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import sequence_norm as portable
from ..backend import implements
from ..boundaries import Boundaries
from . import sequence_norm_kernels as kernels
from .operators import form
from .simd import LANES
from .team import run_on_team


def _fits(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, *_: Any, **__: Any) -> bool:
    return num_groups == x.shape[-1] and num_groups % LANES == 0


@implements(portable.sequence_norm, "cpu", _fits)
def sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    boundaries: Boundaries | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """As megalodon_lm.ops.sequence_norm.sequence_norm, for D groups, a multiple of 16."""
    lengths = None if boundaries is None else boundaries.lengths
    given = x.contiguous(), weight.float() + 1, bias.float().clone(memory_format=torch.contiguous_format)
    return form(sequence_norm_forward, _forward, *given)(*given, eps, lengths, out_dtype or x.dtype)[0]


def _ends(x: Tensor, lengths: Tensor | None) -> Tensor:
    return torch.full((len(x),), x.shape[1]) if lengths is None else lengths.contiguous()


def _empty(x: Tensor, lengths: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (x.new_empty if lengths is None else x.new_zeros)(x.shape, dtype=dtype)


def _tasks(x: Tensor) -> int:
    return len(x) * x.shape[-1] // LANES


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, lengths: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """y and what backward needs: (B, D) means and scales."""
    y, means, scales = _empty(x, lengths, out_dtype), *(torch.empty(len(x), x.shape[-1]) for _ in range(2))
    inputs = tuple(x.shape), x, weight, bias, np.float32(eps), _ends(x, lengths)
    run_on_team(kernels.forward, _tasks(x), *inputs, y, means, scales)
    return y, means, scales


@torch.library.custom_op("megalodon::sequence_norm_forward", mutates_args=())
def sequence_norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, lengths: Tensor | None, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """_forward as an operator."""
    return _forward(x.detach(), weight.detach(), bias.detach(), eps, lengths, out_dtype)


@sequence_norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float, lengths: Any, out_dtype: torch.dtype) -> Any:
    kept = (len(x), x.shape[-1])
    return x.new_empty(x.shape, dtype=out_dtype), *(x.new_empty(kept, dtype=torch.float32) for _ in range(2))


@torch.library.custom_op("megalodon::sequence_norm_backward", mutates_args=())
def sequence_norm_backward(
    x: Tensor, weight: Tensor, lengths: Tensor | None, means: Tensor, scales: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias; rows are summed in order."""
    dx, (dweight, dbias) = _empty(x, lengths, x.dtype), (means.new_empty(means.shape) for _ in range(2))
    inputs = tuple(x.shape), x, weight, _ends(x, lengths), means, scales, dy
    run_on_team(kernels.backward, _tasks(x), *inputs, dx, dweight, dbias)
    return dx, dweight.sum(0), dbias.sum(0)


@sequence_norm_backward.register_fake
def _(x: Tensor, weight: Tensor, lengths: Any, means: Tensor, scales: Tensor, dy: Tensor) -> Any:
    return tuple(t.new_empty(t.shape) for t in (x, weight, weight))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], inputs[4], *output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dy: Tensor, *_: None) -> Any:
    return *sequence_norm_backward(*ctx.saved_tensors, dy.contiguous()), None, None, None


sequence_norm_forward.register_autograd(_backward, setup_context=_save)
