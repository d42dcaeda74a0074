"""A short causal convolution whose taps are weights of a mean."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.short_convolution import short_convolution
from ..state_spec import declare


class ShortConvolution(nn.Module):
    """Each channel becomes a mean of its newest inputs, weighted by a softmax over trained taps.

    Taps are drawn with std 0.1, so that all weigh about the same at the start. See ops.short_convolution.

    Args:
        dim: channels.
        num_taps: inputs that count, the token's own among them.
    """

    def __init__(self, dim: int, num_taps: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(dim, num_taps))

    def init_weights(self) -> None:
        """Draw the taps."""
        nn.init.normal_(self.weight, std=0.1)

    @property
    def state_spec(self) -> Any:
        """The inputs before the next piece."""
        dim, num_taps = self.weight.shape
        return declare(num_taps - 1, dim)

    def forward(self, x: Tensor, state: Tensor | None, boundaries: Boundaries | None) -> tuple[Tensor, Tensor]:
        """x (B, L, D) to (B, L, D), and the newest inputs."""
        taps = self.weight.softmax(-1, torch.promote_types(self.weight.dtype, torch.float32))
        return short_convolution(x, taps, None, state, boundaries)
