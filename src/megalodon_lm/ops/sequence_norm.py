"""SequenceNorm: normalisation with the mean and variance over all steps of a sequence."""

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries
from .padding import zero_padding


@op()
def sequence_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    boundaries: Boundaries | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps) * (weight + 1) + bias, mean and variance those of a group in all valid steps.

    Args:
        x: (B, L, D).
        weight: (D,), stored as an offset from 1.
        bias: (D,).
        num_groups: a divisor of D; D of them normalise each feature by itself.
        eps: added to the population variance.
        boundaries: row lengths; padding yields 0 and counts nowhere. Documents are rows of their own here.
        out_dtype: type of y; that of x by default.

    Returns:
        (B, L, D).
    """
    batch, length, dim = x.shape
    dtype = torch.promote_types(x.dtype, torch.float32)
    groups = x.to(dtype).reshape(batch, length, num_groups, -1)
    lengths = None if boundaries is None else boundaries.lengths
    if lengths is None:
        var, mean = torch.var_mean(groups, (1, 3), correction=0, keepdim=True)
        y = (groups - mean) * (var + eps).rsqrt()
        y = y.view(batch, length, dim) * (weight.to(dtype) + 1) + bias.to(dtype)
    else:
        count = (lengths.clamp(min=1) * groups.shape[-1]).view(-1, 1, 1, 1).to(x.device, dtype)
        groups = zero_padding(groups, lengths)
        mean = groups.sum((1, 3), keepdim=True) / count
        centred = zero_padding(groups - mean, lengths)
        y = centred * (centred.square().sum((1, 3), keepdim=True) / count + eps).rsqrt()
        y = y.view(batch, length, dim) * (weight.to(dtype) + 1) + bias.to(dtype)
        y = zero_padding(y, lengths)
    return y.to(out_dtype or x.dtype)
