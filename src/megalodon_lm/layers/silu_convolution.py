"""The short convolution in front of a recurrence, as Mamba and linear attention have it."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.gates import silu
from ..ops.short_convolution import short_convolution
from ..state_spec import declare


class SiluConvolution(nn.Module):
    """silu of a causal convolution over each channel by itself; see ops.short_convolution.

    Taps start uniform within 1/sqrt(K), as PyTorch's convolution does; the bias starts at zero.

    Args:
        dim: channels.
        num_taps: K, inputs that count, the token's own among them.
        bias: whether there is one.
    """

    def __init__(self, dim: int, num_taps: int, bias: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, num_taps))
        self.bias = nn.Parameter(torch.empty(dim)) if bias else None

    def init_weights(self) -> None:
        """Draw the taps."""
        bound = 1 / math.sqrt(self.weight.shape[1])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def state_spec(self) -> Any:
        """The inputs before the next piece."""
        dim, num_taps = self.weight.shape
        return declare(num_taps - 1, dim)

    def forward(self, x: Tensor, state: Tensor | None, boundaries: Boundaries | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D) to (B, L, D), and the newest inputs."""
        y, leaving = short_convolution(x, self.weight, self.bias, state, boundaries)
        return silu(y), leaving
