"""Attention to all of a chunk as a part of a block: no parameters, only its choices."""

from torch import Tensor, nn

from ..ops.bidirectional_attention import AttentionKind, bidirectional_attention
from ..ops.boundaries import Boundaries


class BidirectionalAttention(nn.Module):
    """Softmax or Laplace attention inside chunks of `chunk_size` steps, 0 for one of all; see the op of that name."""

    def __init__(self, chunk_size: int, rope_base: float, kind: AttentionKind, dropout: float):
        super().__init__()
        self.chunk_size, self.rope_base, self.kind, self.dropout = chunk_size, rope_base, kind, dropout

    def state_spec(self, num_heads: int, z_head_dim: int, value_head_dim: int) -> None:
        """Nothing is carried."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: None, boundaries: Boundaries | None
    ) -> tuple[Tensor, None]:
        """q, k (B, L, H, dk) and v (B, L, H, dv) to (B, L, H, dv)."""
        dropout = self.dropout if self.training else 0.0
        return bidirectional_attention(q, k, v, self.chunk_size, self.rope_base, self.kind, boundaries, dropout), None
