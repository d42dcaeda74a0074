"""Sliding chunk attention as a part of a block: no parameters, only its choices."""

import torch
from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.sliding_attention import SlidingCache, sliding_attention
from ..state_spec import declare


class SlidingAttention(nn.Module):
    """Causal softmax attention to a token's own chunk of `chunk_size` tokens and the one before, with rotary positions.

    The last `heads_without_rope` heads have none. See ops.sliding_attention.
    """

    def __init__(self, chunk_size: int, rope_base: float, dropout: float, drop_keys: bool, heads_without_rope: int = 0):
        super().__init__()
        self.chunk_size, self.rope_base = chunk_size, rope_base
        self.dropout, self.drop_keys = dropout, drop_keys
        self.heads_without_rope = heads_without_rope

    def state_spec(self, num_heads: int, z_head_dim: int, value_head_dim: int) -> SlidingCache:
        """The chunk before and the unfinished one: a cache, of which the first stays at the end of a chunk."""
        c = self.chunk_size
        keys, values = (declare(2 * c, num_heads, d, fill="fill", kept=c) for d in (z_head_dim, value_head_dim))
        fill, position = (declare(dtype=torch.int64, on_cpu=True) for _ in range(2))
        return SlidingCache(keys, values, fill, position)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: SlidingCache | None, boundaries: Boundaries | None
    ) -> tuple[Tensor, SlidingCache]:
        """q, k (B, L, H, dk) and v (B, L, H, dv) to (B, L, H, dv), and what comes before the next piece."""
        dropout = self.dropout if self.training else 0.0
        given = (self.chunk_size, self.rope_base, cache, boundaries, dropout, self.drop_keys, self.heads_without_rope)
        return sliding_attention(q, k, v, *given)
