"""Linear layers that read, in squares or by the faster library, over weights laid out once."""

import functools
from typing import Any

import torch
from torch import Tensor

from .. import linear as portable
from ..backend import implements
from ..derived import derived, rounded
from ..linear import Layer
from . import squares_linear

MANY = 1 << 22  # multiplications from which a product by oneDNN gains more than starting it costs


def _fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if squares_linear.fits(x, weight):
        return True
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.numel():
        return False
    if x.dtype == torch.bfloat16:
        return _onednn_multiplies_bf16()
    if weight.dtype != torch.float32 or not weight.is_contiguous():  # other strides take a thousand times as long
        return False
    return x.numel() * len(weight) >= MANY and _onednn_multiplies_float32_faster()


@implements(portable.linear, "cpu", _fits)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """As megalodon_lm.ops.linear.linear, for float32 or bf16, without gradients.

    Where layers are no whole squares: in float32 PyTorch takes MKL's products, which on processors of AMD use AVX2 at
    most, and reach less with it than oneDNN's. Those take the weight as it lies. In bf16 weights are kept in the layout
    in which they are multiplied, and the bias is added within the product; PyTorch's linear lays the weight out anew
    and copies the bias into the result each time.
    """
    if squares_linear.fits(x, weight):
        return squares_linear.linears(x, ((weight, bias),))[0]
    if x.dtype == torch.float32:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    bias = None if bias is None else rounded(bias, x.dtype)
    return torch.ops.mkldnn._linear_pointwise(x, derived(_laid_out, weight), bias, "none", [], "")


def _fit(x: Tensor, *layers: Layer) -> bool:
    biased = {bias is not None for _, bias in layers}
    return len(biased) == 1 and squares_linear.fits(x, *(weight for weight, _ in layers))


@implements(portable.linears, "cpu", lambda x, layers: _fit(x, *layers))
def linears(x: Tensor, layers: tuple[Layer, ...]) -> tuple[Tensor, ...]:
    """As megalodon_lm.ops.linear.linears, in squares."""
    return tuple(squares_linear.linears(x, layers))


@implements(portable.linear_silu, "cpu", _fit)
def linear_silu(x: Tensor, layer: Layer) -> Tensor:
    """As megalodon_lm.ops.linear.linear_silu, in squares; sums are rounded after SiLU alone."""
    return squares_linear.linears(x, (layer,), silu=True)[0]


@implements(portable.linear_gate, "cpu", _fit)
def linear_gate(x: Tensor, gate: Layer, layer: Layer) -> Tensor:
    """As megalodon_lm.ops.linear.linear_gate, in squares; only the product is rounded."""
    return squares_linear.linear_gate(x, (gate, layer))


def _adds(x: Tensor, layer: Layer, residual: Tensor, other: Tensor | None = None) -> bool:
    return _fit(x, layer) and residual.dtype in (torch.float32, x.dtype) and (other is None or other.dtype == x.dtype)


@implements(portable.linear_add, "cpu", _adds)
def linear_add(x: Tensor, layer: Layer, residual: Tensor, other: Tensor | None = None) -> Tensor:
    """As megalodon_lm.ops.linear.linear_add, in squares; only the sum is rounded."""
    return squares_linear.linear_add(x, layer, residual, other)


def _laid_out(weight: Tensor) -> Tensor:
    return torch.ops.mkldnn._reorder_linear_weight(weight.to(torch.bfloat16).contiguous())


@functools.cache
def _onednn_multiplies_float32_faster() -> bool:
    """On processors of AMD, which MKL gives one kernel for AVX2; on those of its own maker they were not compared."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkl.is_available()):
        return False
    ask: Any = getattr(torch.cpu, "get_capabilities", dict)  # older versions of PyTorch tell nothing
    return str(ask().get("cpu_name", "")).startswith("AMD")


@functools.cache
def _onednn_multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
