"""The CEMA layer: parameters of the complex exponential moving average, and their initial values."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.cema import cema, cema_coefficients
from ..ops.derived import derived
from ..state_spec import declare


class ComplexEMA(nn.Module):
    """Complex exponential moving average over D channels with N states each; see ops.cema.

    Initial values: alpha, delta normal with std 0.2; theta the logits of exp(-i ln(D) / D), i = 1..D, permuted over the
    channels; gamma normal with std 1 and imaginary part 0; omega truncated normal, std 0.25, in [-1, 1].
    """

    def __init__(self, dim: int, ndim: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.empty(dim, ndim, 1))
        self.delta = nn.Parameter(torch.empty(dim, ndim, 1))
        self.theta = nn.Parameter(torch.empty(dim, 1, 1))
        self.gamma = nn.Parameter(torch.empty(dim, ndim, 2))
        self.omega = nn.Parameter(torch.empty(dim, 1))

    def init_weights(self) -> None:
        """Draw the initial values."""
        dim = len(self.theta)
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        frequency = torch.exp(-torch.arange(1, dim + 1, device=self.theta.device) * math.log(max(dim, 2)) / dim)
        order = torch.randperm(dim, device=self.theta.device)
        with torch.no_grad():
            self.theta.copy_(torch.logit(frequency)[order].view(dim, 1, 1))
            nn.init.normal_(self.gamma)
            self.gamma[..., 1] = 0
        nn.init.trunc_normal_(self.omega, std=0.25, a=-1, b=1)

    @property
    def state_spec(self) -> Any:
        """(D, N, 2): complex states as real pairs, float32 or better."""
        return declare(*self.gamma.shape, dtype=torch.float32)

    def forward(
        self, x: Tensor, state: Tensor | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D) and the entry state (B, D, N, 2) to y (B, L, D) and the exit state."""
        p, q, g = derived(cema_coefficients, self.alpha, self.delta, self.theta, self.gamma)
        return cema(x, p, q, g, self.omega.squeeze(-1), state, boundaries)
