"""Rotary positions on the CPU, as an operator with fake and autograd."""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..chunk_attention import rotations
from . import elementwise_kernels as kernels
from .simd import LANES, as_numpy
from .threads import parallel_for


def fits(x: Tensor) -> bool:
    """Whether the kernels take this width."""
    return x.shape[-1] % LANES == 0


def rope(x: Tensor, slots: Tensor, base: float, highest: int) -> Tensor:
    """As megalodon_lm.ops.chunk_attention.rope, for x in float32 or bf16."""
    batch, length = x.shape[:2]
    where = slots.expand(batch, length).contiguous()
    keep = torch.is_grad_enabled() and x.requires_grad
    run = rotate if keep or torch.compiler.is_compiling() else _rotate
    return run(x.contiguous(), where, *_tables(highest, x.shape[-1], base), False)


@lru_cache(maxsize=16)
def _tables(highest: int, dim: int, base: float) -> tuple[Tensor, Tensor]:
    """cos and sin of both of a pair, (highest, d), the sine negative in even places."""
    with torch.inference_mode(False):
        cos, sin = rotations(highest, dim, base, torch.float32, torch.device("cpu"))
        return cos.repeat_interleave(2, -1), torch.stack([-sin, sin], -1).flatten(-2)


def _rotate(x: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    y = torch.empty_like(x)
    heads, dim = x.shape[-2:]
    arrays = [as_numpy(t) for t in (slots, cos, sin)]
    parallel_for(kernels.rotate, slots.numel(), as_numpy(x), heads, dim, *arrays, inverse, as_numpy(y))
    return y


@torch.library.custom_op("megalodon::rotate", mutates_args=())
def rotate(x: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """_rotate as an operator."""
    return _rotate(x.detach(), slots, cos, sin, inverse)


@rotate.register_fake
def _(x: Tensor, slots: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    return torch.empty_like(x)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[1:4])
    ctx.inverse = inputs[4]


def _backward(ctx: Any, grad: Tensor) -> Any:
    return rotate(grad.contiguous(), *ctx.saved_tensors, not ctx.inverse), None, None, None, None


rotate.register_autograd(_backward, setup_context=_save)
