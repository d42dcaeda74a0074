"""Sliding attention on the CPU: the same function as the portable one, out of operators of compiled code."""

import torch
from torch import Tensor

from .. import sliding_attention as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..sliding_attention import SlidingCache
from ..windowed_attention import Window
from .windowed_attention import fits, windowed_attention


@implements(portable.sliding_attention, "cpu", fits)
def sliding_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: SlidingCache | None = None,
    boundaries: Boundaries | None = None,
    dropout: float = 0.0,
    drop_keys: bool = False,
    heads_without_rope: int = 0,
) -> tuple[Tensor, SlidingCache]:
    """As megalodon_lm.ops.sliding_attention.sliding_attention; for q, k and v of one type, without dropout."""
    batch, length = q.shape[:2]
    where, window = boundaries or Boundaries(), Window(chunk_size, chunk_size)
    position = torch.zeros(batch, dtype=torch.int64) if cache is None else cache.position
    entry = None if cache is None else (cache.keys, cache.values, cache.fill)
    places = where.since_start(position, length)
    out, *leaving = windowed_attention(q, k, v, window, rope_base, entry, boundaries, heads_without_rope, places)
    return out, SlidingCache(*leaving, where.exit_position(position, length))
