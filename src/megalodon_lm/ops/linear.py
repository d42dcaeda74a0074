"""Products of reading, without gradients: by the faster library, and in a narrower type with weights rounded once."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .derived import derived, rounded

MANY = 1 << 22  # multiplications from which a product by oneDNN gains more than starting it costs


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, all of one type; without gradients.

    In float32 PyTorch takes MKL's products, which on processors of AMD use AVX2 at most, and reach less with it than
    oneDNN's. Those take the weight as it lies.

    Args:
        x: (..., fan_in).
        weight: (fan_out, fan_in).
        bias: (fan_out,), or None.

    Returns:
        (..., fan_out).
    """
    in_float32 = x.dtype == weight.dtype == torch.float32 and x.device.type == weight.device.type == "cpu"
    if not in_float32 or torch.compiler.is_compiling() or not _onednn_multiplies_float32_faster():
        return F.linear(x, weight, bias)
    if x.numel() * len(weight) < MANY or not weight.is_contiguous():  # other strides take a thousand times as long
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def rounded_linear(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """x @ weight.T + bias with all of it rounded to a type; without gradients.

    On the CPU, bf16 weights are kept in the layout in which oneDNN multiplies, and it adds the bias within its product.
    PyTorch's linear lays the weight out anew and copies the bias into the result each time.

    Args:
        x: (..., fan_in).
        weight: (fan_out, fan_in).
        bias: (fan_out,), or None.
        dtype: of the product.

    Returns:
        (..., fan_out).
    """
    x, bias = x.to(dtype), None if bias is None else rounded(bias, dtype)
    on_cpu = x.device.type == weight.device.type == "cpu" and dtype == torch.bfloat16
    if not on_cpu or torch.compiler.is_compiling() or not x.numel() or not _onednn_multiplies_bf16():
        return F.linear(x, rounded(weight, dtype), bias)
    return torch.ops.mkldnn._linear_pointwise(x, derived(_laid_out, weight), bias, "none", [], "")


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
