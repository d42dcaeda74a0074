"""Chunk attention as a part of a block: no parameters, only its choices."""

import torch
from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.chunk_attention import KeyValueCache, chunk_attention
from ..state_spec import declare


class ChunkAttention(nn.Module):
    """Causal softmax attention inside chunks of `chunk_size` tokens, with rotary positions.

    The last `heads_without_rope` heads have none. See ops.chunk_attention.
    """

    def __init__(self, chunk_size: int, rope_base: float, dropout: float, drop_keys: bool, heads_without_rope: int = 0):
        super().__init__()
        self.chunk_size, self.rope_base = chunk_size, rope_base
        self.dropout, self.drop_keys = dropout, drop_keys
        self.heads_without_rope = heads_without_rope

    def state_spec(self, num_heads: int, z_head_dim: int, value_head_dim: int) -> KeyValueCache:
        """The unfinished chunk: a cache."""
        keys, values = (declare(self.chunk_size, num_heads, dim, fill="fill") for dim in (z_head_dim, value_head_dim))
        return KeyValueCache(keys, values, declare(dtype=torch.int64, on_cpu=True))

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cache: KeyValueCache | None, boundaries: Boundaries | None
    ) -> tuple[Tensor, KeyValueCache]:
        """q, k (B, L, H, dk) and v (B, L, H, dv) to (B, L, H, dv), and the unfinished chunk at the exit."""
        dropout = self.dropout if self.training else 0.0
        given = (self.chunk_size, self.rope_base, cache, boundaries, dropout, self.drop_keys, self.heads_without_rope)
        return chunk_attention(q, k, v, *given)
