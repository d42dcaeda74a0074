"""The CEMA layer: parameters of the complex exponential moving average, and their initial values."""

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.cema import cema, cema_coefficients, ema_coefficients
from ..ops.derived import derived
from ..state_spec import declare


class ComplexEMA(nn.Module):
    """Exponential moving average over D channels with N states each; see ops.cema.

    Initial values: alpha, delta normal with std 0.2; theta the logits of exp(-i ln(D) / D), i = 1..D, permuted over the
    channels; gamma normal with std 1 and imaginary part 0; omega truncated normal, std 0.25, in [-1, 1].

    Args:
        dim: D.
        ndim: N.
        rotating: whether states turn, and are complex: CEMA (Megalodon); otherwise the EMA of MEGA, without theta.
        direct: whether omega weighs the input (Megalodon's code). Otherwise the input itself is added (Gecko), and
            gamma has std 1/sqrt(N) at the start and is not divided by sqrt(N) later.
        directions: averages of each channel, one after the other in the rows of all parameters but omega.
    """

    spared: ClassVar[tuple[str, ...]] = ("alpha", "delta", "theta")
    """Parameters that weight decay passes over, where the recipe says so: they make the decays and the angles."""

    def __init__(self, dim: int, ndim: int, rotating: bool = True, direct: bool = True, directions: int = 1):
        super().__init__()
        self.directions, rows = directions, directions * dim
        self.alpha = nn.Parameter(torch.empty(rows, ndim, 1))
        self.delta = nn.Parameter(torch.empty(rows, ndim, 1))
        self.theta = nn.Parameter(torch.empty(rows, 1, 1)) if rotating else None
        self.gamma = nn.Parameter(torch.empty(rows, ndim, 2 if rotating else 1))
        self.omega = nn.Parameter(torch.empty(dim, 1)) if direct else None

    def init_weights(self) -> None:
        """Draw the initial values."""
        rows, ndim, _ = self.gamma.shape
        dim = rows // self.directions
        nn.init.normal_(self.alpha, std=0.2)
        nn.init.normal_(self.delta, std=0.2)
        with torch.no_grad():
            if self.theta is not None:
                frequency = torch.exp(-torch.arange(1, dim + 1, device=self.theta.device) * math.log(max(dim, 2)) / dim)
                for theta in self.theta.split(dim):
                    order = torch.randperm(dim, device=theta.device)
                    theta.copy_(torch.logit(frequency)[order].view(dim, 1, 1))
            nn.init.normal_(self.gamma, std=1 / math.sqrt(ndim) if self.omega is None else 1.0)
            self.gamma[..., 1:] = 0
        if self.omega is not None:
            nn.init.trunc_normal_(self.omega, std=0.25, a=-1, b=1)

    @property
    def state_spec(self) -> Any:
        """(D, N, 2): complex states as real pairs, float32 or better; (D, N, 1) where they do not turn."""
        return declare(*self.gamma.shape, dtype=torch.float32)

    def coefficients(self) -> tuple[Tensor, Tensor, Tensor]:
        """p, q and g of the recurrence; see ops.cema."""
        scaled = (self.omega is not None,)
        if self.theta is None:
            return derived(ema_coefficients, self.alpha, self.delta, self.gamma, arguments=scaled)
        return derived(cema_coefficients, self.alpha, self.delta, self.theta, self.gamma, arguments=scaled)

    def forward(
        self, x: Tensor, state: Tensor | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, Tensor]:
        """x (B, L, D) and the entry state (B, D, N, 2 or 1) to y (B, L, D) and the exit state."""
        p, q, g = self.coefficients()
        omega = derived(_ones, p) if self.omega is None else derived(_flat, self.omega)
        if self.theta is not None:
            return cema(x, p, q, g, omega, state, boundaries)
        y, leaving = cema(x, p, q, g, omega, None if state is None else F.pad(state, (0, 1)), boundaries)
        return y, leaving[..., :1]


def _ones(p: Tensor) -> Tensor:
    return p.new_ones(len(p))


def _flat(omega: Tensor) -> Tensor:
    return omega.squeeze(-1)
