"""SiLU, and products that it gates."""

import torch.nn.functional as F
from torch import Tensor

from .backend import op


@op()
def silu(x: Tensor) -> Tensor:
    """x / (1 + e^-x), elementwise."""
    return F.silu(x)


@op()
def silu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """silu(gate) * x, elementwise; gate and x of one shape and type."""
    return F.silu(gate) * x
