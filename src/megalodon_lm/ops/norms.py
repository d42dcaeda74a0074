"""Normalisation over the features of one token. Scales are given as offsets from 1."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import op


@op()
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


@op()
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """(x - mean(x)) / std(x) * (weight + 1) + bias; arguments as in rms_norm."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    normed = F.layer_norm(x.to(dtype), x.shape[-1:], weight.to(dtype) + 1, bias.to(dtype), eps)
    return normed.to(out_dtype or x.dtype)


@op()
def head_rms_norm(z: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """Divide each head's features by their root mean square, then one affine map each.

    Args:
        z: (..., H, d).
        scale, shift: (H, d).
        eps: added to the mean square.
    """
    dtype = torch.promote_types(z.dtype, torch.float32)
    return (F.rms_norm(z.to(dtype), z.shape[-1:], eps=eps) * scale.to(dtype) + shift.to(dtype)).to(z.dtype)


def head_maps(gamma: Tensor, beta: Tensor, width: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Scales and shifts for head_rms_norm, (H, width) of each view: (gamma + 1) / sqrt(width) and beta.

    In float32 or better, or 1 + 0.003 would be 1.

    Args:
        gamma, beta: (views, H * width).
        width: of a head.
    """
    dtype = torch.promote_types(gamma.dtype, torch.float32)
    scales, shifts = (gamma.to(dtype) + 1) / math.sqrt(width), beta.to(dtype)
    return tuple(scales.unflatten(-1, (-1, width))), tuple(shifts.unflatten(-1, (-1, width)))
