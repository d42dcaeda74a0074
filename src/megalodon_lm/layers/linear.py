"""The linear layer: as PyTorch's, but reading with it rounds its weights once and not for each piece."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.linear import linear
from .initialization import Initialiser


class Linear(nn.Linear):
    """x @ weight.T + bias, in the type of autocast where that is on.

    Args:
        fan_in: features of x.
        fan_out: features of the result.
        bias: whether there is one; it starts at zero.
        init: draws the initial weight; None for one that is tied to another module's.
    """

    def __init__(self, fan_in: int, fan_out: int, bias: bool, init: Initialiser | None):
        super().__init__(fan_in, fan_out, bias)
        self.init = init

    def reset_parameters(self) -> None:
        """Nothing: PyTorch's constructor would draw here."""

    def init_weights(self) -> None:
        """Draw the weight."""
        if self.init is not None:
            self.init(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) to (..., fan_out)."""
        reads = not torch.is_grad_enabled() and self.weight.dtype != torch.float64
        if reads and (torch.is_autocast_enabled(x.device.type) or x.dtype == self.weight.dtype):
            return linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)  # with gradients, autocast rounds and knows the way back
