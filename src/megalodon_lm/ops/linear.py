"""The product of reading in a narrower type: weights are rounded and laid out once, not for each piece."""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from .derived import derived, rounded


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
def _onednn_multiplies_bf16() -> bool:
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
