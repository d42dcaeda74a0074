"""The Laplace function of MEGA: weights of attention, each by its own score."""

import math

import torch
from torch import Tensor

from .backend import op

MEAN, DEVIATION = math.sqrt(0.5), math.sqrt(0.25 / math.pi)
"""Of the normal distribution that fits relu(s)^2."""
WIDTH = DEVIATION * math.sqrt(2)


@op()
def laplace(scores: Tensor, counts: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """0.5 (1 + erf((s / n - mean) / (deviation sqrt(2)))).

    Args:
        scores: (M, ...).
        counts: (M,), the numbers n that they are divided by.
        out_dtype: type of the weights; that of the scores by default.
    """
    wide = scores.to(torch.promote_types(scores.dtype, torch.float32))
    shift, half = (torch.full((), c, dtype=wide.dtype, device=wide.device) for c in (-MEAN / WIDTH, 0.5))
    factor = (1 / (WIDTH * counts.to(wide.dtype))).view(-1, *(1,) * (scores.dim() - 1))
    weights = torch.add(half, torch.erf(torch.addcmul(shift, wide, factor)), alpha=0.5)  # as few passes as can be
    return weights.to(out_dtype or scores.dtype)
