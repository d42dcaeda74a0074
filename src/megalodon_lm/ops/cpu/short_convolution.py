"""The shifted products of the short convolution on the CPU, as an operator with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import short_convolution as portable
from ..backend import implements
from . import short_convolution_kernels as kernels
from .operators import form
from .simd import LANES
from .team import run_on_team

_STRETCH = 64  # inputs whose gradients to the taps are summed together, whatever the number of threads


def _fits(window: Tensor, weight: Tensor, *_: Any) -> bool:
    return window.shape[-1] % LANES == 0 and window.shape[1] >= weight.shape[1]


@implements(portable.shifted_products, "cpu", _fits)
def shifted_products(window: Tensor, weight: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    """As megalodon_lm.ops.short_convolution.shifted_products, for a window in float32 or bf16."""
    batch, length = len(window), window.shape[1] - weight.shape[1] + 1
    taps = weight.float().t().contiguous()
    bias = taps.new_zeros(len(weight)) if bias is None else bias.float().clone()
    if seen is None:
        seen = torch.full((batch, length), weight.shape[1] - 1)
    return form(convolve, _forward, window, taps, bias)(window.contiguous(), taps, bias, seen.contiguous())


def _forward(window: Tensor, taps: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    y = window.new_empty(*seen.shape, window.shape[-1])
    tasks = -(-seen.numel() // _STRETCH)
    sizes = _STRETCH, seen.shape[1], window.shape[-1]
    run_on_team(kernels.forward_on_team, tasks, *sizes, window, taps, bias, seen, y)
    return y


@torch.library.custom_op("megalodon::short_convolution", mutates_args=())
def convolve(window: Tensor, taps: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    """_forward as an operator."""
    return _forward(window.detach(), taps.detach(), bias.detach(), seen)


@convolve.register_fake
def _(window: Tensor, taps: Tensor, bias: Tensor, seen: Tensor) -> Tensor:
    return window.new_empty(*seen.shape, window.shape[-1])


@torch.library.custom_op("megalodon::short_convolution_backward", mutates_args=())
def convolve_backward(window: Tensor, taps: Tensor, seen: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to window, taps and bias."""
    dim = window.shape[-1]
    stretches = -(-window.numel() // (dim * _STRETCH))
    grad_window, grad_taps = torch.empty_like(window), taps.new_empty(stretches, *taps.shape)
    grad_bias = taps.new_empty(stretches, dim)
    inputs = _STRETCH, seen.shape[1], dim, window, taps, seen, grad_y
    run_on_team(kernels.backward_on_team, stretches, *inputs, grad_window, grad_taps, grad_bias)
    return grad_window, grad_taps.sum(0), grad_bias.sum(0)


@convolve_backward.register_fake
def _(window: Tensor, taps: Tensor, seen: Tensor, grad_y: Tensor) -> Any:
    return window.new_empty(window.shape), taps.new_empty(taps.shape), taps.new_empty(taps.shape[1])


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    window, taps, _, seen = inputs
    ctx.save_for_backward(window, taps, seen)


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    return *convolve_backward(*ctx.saved_tensors, grad_y.contiguous()), None


convolve.register_autograd(_backward, setup_context=_save)
