"""The moving average in both directions as a part of a block."""

from typing import Any

from torch import Tensor

from ..ops.bidirectional_cema import Coefficients, bidirectional_cema
from ..ops.boundaries import Boundaries
from ..ops.cema import cema_coefficients, ema_coefficients
from ..ops.derived import derived
from .complex_ema import ComplexEMA


class BidirectionalEMA(ComplexEMA):
    """Averages of the steps up to each and of those after it, of one kind, summed; see ops.bidirectional_cema.

    Their parameters are 2D rows, those of the first average before those of the second; omega has D.
    """

    def __init__(self, dim: int, ndim: int, rotating: bool = True, direct: bool = True):
        super().__init__(dim, ndim, rotating, direct, directions=2)

    @property
    def state_spec(self) -> Any:
        """Nothing is carried."""
        return None

    def forward(  # type: ignore[override]
        self, x: Tensor, state: None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, None]:
        """x (B, L, D) to (B, L, D)."""
        given = [t for t in (self.alpha, self.delta, self.theta, self.gamma) if t is not None]
        before, after = derived(_of_both, *given, arguments=(self.omega is not None,))
        omega = before[0].new_ones(x.shape[-1]) if self.omega is None else self.omega.squeeze(-1)
        return bidirectional_cema(x, before, after, omega, boundaries), None


def _of_both(*parameters: Any) -> tuple[Coefficients, Coefficients]:
    """The coefficients of the two averages, from parameters of both and whether they are scaled."""
    coefficients: Any = cema_coefficients if len(parameters) == 5 else ema_coefficients
    made = coefficients(*parameters)
    (p, p_after), (q, q_after), (g, g_after) = (t.chunk(2) for t in made)
    return (p, q, g), (p_after, q_after, g_after)
