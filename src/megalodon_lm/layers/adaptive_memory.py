"""Adaptive working memory as a part of a block: no parameters, only its choices."""

import torch
from torch import Tensor, nn

from ..ops.adaptive_memory import MemoryState, ValueCache, adaptive_memory
from ..ops.boundaries import Boundaries
from ..state_spec import declare


class AdaptiveMemory(nn.Module):
    """A matrix per head that absorbs chunks of `chunk_size` tokens; chunk j reads what chunk j - lag left.

    See ops.adaptive_memory.
    """

    def __init__(self, chunk_size: int, lag: int):
        super().__init__()
        self.chunk_size, self.lag = chunk_size, lag

    def state_spec(self, num_heads: int, z_head_dim: int, value_head_dim: int) -> MemoryState:
        """The unfinished chunk's keys, a cache, and what was absorbed."""
        count = declare(dtype=torch.int64, on_cpu=True)
        return MemoryState(
            keys=declare(self.chunk_size, num_heads, z_head_dim, fill="fill"),
            fill=count,
            memory=declare(self.lag, num_heads, z_head_dim, value_head_dim, dtype=torch.float32),
            log_sum=declare(num_heads, z_head_dim, dtype=torch.float64),
            chunks=count,
        )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: MemoryState | None,
        cache: ValueCache | None,
        boundaries: Boundaries | None,
    ) -> tuple[Tensor, MemoryState]:
        """Views q, k (B, L, H, dk) and values v (B, L, H, dv) to (B, L, H, dv), and the state at the exit.

        `cache` is that of attention at the entry, whose last values belong to the unfinished chunk.
        """
        return adaptive_memory(q, k, v, self.chunk_size, self.lag, state, cache, boundaries)
