"""Linear layers that read: without gradients, with weights that are rounded once."""

import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .derived import rounded


@op(rounded=1)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in the type of x, to which weight and bias are rounded once and not for each piece.

    Args:
        x: (..., fan_in).
        weight: (fan_out, fan_in).
        bias: (fan_out,), or None.

    Returns:
        (..., fan_out).
    """
    return F.linear(x, rounded(weight, x.dtype), None if bias is None else rounded(bias, x.dtype))
