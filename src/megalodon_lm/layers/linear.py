"""The linear layer: as PyTorch's, but reading with it rounds its weights once and not for each piece."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.derived import rounded


class Linear(nn.Linear):
    """x @ weight.T + bias, in the type of autocast where that is on. Its weights are drawn by layers.initialization."""

    def reset_parameters(self) -> None:
        """Draw nothing: PyTorch's own values would be overwritten."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) to (..., fan_out)."""
        device = x.device.type
        if torch.is_grad_enabled() or not torch.is_autocast_enabled(device) or self.weight.dtype == torch.float64:
            return F.linear(x, self.weight, self.bias)  # with gradients, autocast rounds and knows the way back
        dtype = torch.get_autocast_dtype(device)
        return F.linear(x, rounded(self.weight, dtype), None if self.bias is None else rounded(self.bias, dtype))
