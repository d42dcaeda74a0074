"""Padding on the CPU: rows are copied, each at once. PyTorch chooses between two tensors value by value."""

from typing import Any

import torch
from torch import Tensor

from .. import padding as portable
from ..backend import implements


def _fits(x: Tensor, lengths: Tensor | None, late: int = 0) -> bool:
    return lengths is not None and not torch.compiler.is_compiling()


@implements(portable.zero_padding, "cpu", _fits)
def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """As megalodon_lm.ops.padding.zero_padding."""
    y: Tensor = _ZeroPadding.apply(x, lengths)
    return y


@implements(portable.reverse, "cpu", _fits)
def reverse(x: Tensor, lengths: Tensor | None, late: int = 0) -> Tensor:
    """As megalodon_lm.ops.padding.reverse."""
    y: Tensor = _Reverse.apply(x, lengths, late)
    return y


class _ZeroPadding(torch.autograd.Function):
    """Its gradient is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor) -> Tensor:
        ctx.lengths = lengths
        y = x.clone(memory_format=torch.contiguous_format)
        for row, length in zip(y, lengths.tolist(), strict=True):
            row[length:] = 0
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _ZeroPadding.apply(grad, ctx.lengths), None


class _Reverse(torch.autograd.Function):
    """Its gradient is itself: steps from `late` on change places in pairs."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, lengths: Tensor, late: int) -> Tensor:
        ctx.lengths, ctx.late = lengths, late
        y = x.new_zeros(x.shape)
        for row, turned, length in zip(x, y, lengths.tolist(), strict=True):
            turned[late:length] = row[late:length].flip(0)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _Reverse.apply(grad, ctx.lengths, ctx.late), None, None
