"""Gated products."""

import torch.nn.functional as F
from torch import Tensor

from .backend import op


@op()
def silu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, elementwise; gate and x of one shape and type."""
    return F.silu(gate) * x
