"""SequenceNorm as a part of a block, in the place of a norm over time."""

from torch import Tensor

from ..ops.boundaries import Boundaries
from ..ops.sequence_norm import sequence_norm
from .norms import AffineNorm


class SequenceNorm(AffineNorm):
    """Statistics of all steps of a sequence, in groups of `group_dim` features; see ops.sequence_norm."""

    state_spec = None

    def __init__(self, dim: int, group_dim: int, eps: float):
        super().__init__(dim, eps)
        self.group_dim = group_dim

    def forward(self, x: Tensor, state: None = None, boundaries: Boundaries | None = None) -> tuple[Tensor, None]:
        """x (B, L, D) to (B, L, D), and nothing that is carried."""
        return sequence_norm(x, self.weight, self.bias, x.shape[-1] // self.group_dim, self.eps, boundaries), None
