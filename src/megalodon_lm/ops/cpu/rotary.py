"""Rotary positions as an operator: its backward is the rotation by the opposite angle."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..rotary import rotations
from .operators import form
from .scalars import pair, paired
from .simd import as_numpy, compiled, inner
from .team import num_threads, share

_SIGNS = (np.float32(1), np.float32(-1))


def rotate(x: Tensor, slots: Tensor, base: float, highest: int) -> Tensor:
    """As megalodon_lm.ops.rotary.rope, for float32 and bf16.

    Args:
        x: (B, L, H, d), d even.
        slots: (B, L) int64 positions below `highest`; where negative, the result is 0.
        base: of the frequencies.
        highest: number of positions that may occur.
    """
    return form(rotate_pairs, _rotate, x)(x.contiguous(), slots.contiguous(), base, highest, False)


@inner(fastmath={"contract"})
def _turn(x: Any, cos: Any, sin: Any, sign: Any, y: Any) -> None:
    for i in range(len(cos)):
        even, odd = pair(x[i])
        s = sign * sin[i]
        y[i] = paired(even * cos[i] - odd * s, even * s + odd * cos[i], y)


@inner(fastmath={"contract"})
def _turn_tokens(first: int, last: int, x: Any, slots: Any, cos: Any, sin: Any, sign: Any, y: Any) -> None:
    length, heads = x.shape[1], x.shape[2]
    for task in range(first, last):
        b, t = task // length, task % length
        slot = slots[b, t]
        if slot < 0:
            y[b, t] = 0
            continue
        for h in range(heads):
            _turn(x[b, t, h], cos[slot], sin[slot], sign, y[b, t, h])


@compiled
def _turn_all(threads: int, x: Any, slots: Any, cos: Any, sin: Any, sign: Any, y: Any) -> None:
    share(_turn_tokens, threads, x.shape[0] * x.shape[1], (x, slots, cos, sin, sign, y))


def _rotate(x: Tensor, slots: Tensor, base: float, highest: int, back: bool) -> Tensor:
    cos, sin = rotations(highest, x.shape[-1], base, torch.float32, x.device)
    y = x.new_empty(x.shape)
    words = np.uint32 if x.dtype == torch.bfloat16 else np.uint64  # of two elements
    table = (as_numpy(cos), as_numpy(sin), _SIGNS[back])
    _turn_all(num_threads(), as_numpy(x).view(words), as_numpy(slots), *table, as_numpy(y).view(words))
    return y


@torch.library.custom_op("megalodon::rotate_pairs", mutates_args=())
def rotate_pairs(x: Tensor, slots: Tensor, base: float, highest: int, back: bool) -> Tensor:
    """_rotate as an operator; `back` turns by the opposite angle."""
    return _rotate(x, slots, base, highest, back)


@rotate_pairs.register_fake
def _(x: Tensor, slots: Tensor, base: float, highest: int, back: bool) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, slots, ctx.base, ctx.highest, ctx.back = inputs
    ctx.save_for_backward(slots)


def _backward(ctx: Any, grad: Tensor) -> Any:
    grad_x = rotate_pairs(grad.contiguous(), *ctx.saved_tensors, ctx.base, ctx.highest, not ctx.back)
    return grad_x, None, None, None, None


rotate_pairs.register_autograd(_backward, setup_context=_save)
