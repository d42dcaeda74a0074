"""Normalisation over the features of one token. Scales are given as offsets from 1."""

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """x / rms(x) * (weight + 1).

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.
        out_dtype: of the result; that of x by default.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    return F.rms_norm(x.to(dtype), x.shape[-1:], weight.to(dtype) + 1, eps).to(out_dtype or x.dtype)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """(x - mean(x)) / std(x) * (weight + 1) + bias; arguments as in rms_norm."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype) + 1, bias.to(dtype), eps)
    return normed.to(out_dtype or x.dtype)


def head_rms_norm(z: Tensor, num_heads: int, eps: float) -> Tensor:
    """Divide each head's slice of the last dimension by its root mean square; no scale.

    Args:
        z: (..., Z).
        num_heads: H, a divisor of Z.
        eps: added to the mean square.
    """
    heads = z.unflatten(-1, (num_heads, -1))
    return F.rms_norm(heads, heads.shape[-1:], eps=eps).flatten(-2)
