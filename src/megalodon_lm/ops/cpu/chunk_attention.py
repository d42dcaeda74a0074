"""Chunk attention on the CPU: the same function as the portable one, out of operators of compiled code."""

from typing import Any

import torch
from torch import Tensor

from .. import chunk_attention as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..chunk_attention import KeyValueCache
from ..windowed_attention import Window, token_slots
from .causal_attention import causal_attention
from .open_chunk import open_chunk
from .rotary import rotate


def _fits(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: Any = None,
    boundaries: Any = None,
    dropout: float = 0.0,
    drop_keys: bool = False,
    heads_without_rope: int = 0,
) -> bool:
    return not dropout and not heads_without_rope and q.dtype == k.dtype == v.dtype


@implements(portable.chunk_attention, "cpu", _fits)
def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: KeyValueCache | None = None,
    boundaries: Boundaries | None = None,
    dropout: float = 0.0,
    drop_keys: bool = False,
    heads_without_rope: int = 0,
) -> tuple[Tensor, KeyValueCache]:
    """As megalodon_lm.ops.chunk_attention.chunk_attention; for q, k and v of one type, without dropout."""
    batch, length = q.shape[:2]
    if cache is None:
        keys, values, fill = None, None, torch.zeros(batch, dtype=torch.int64)
    else:
        keys, values, fill = cache.keys.to(k.dtype).contiguous(), cache.values.to(v.dtype).contiguous(), cache.fill
    places = boundaries or Boundaries()
    slots = token_slots(Window(chunk_size), fill, places, length)
    stops = torch.full_like(fill, length) if places.lengths is None else places.lengths

    v = v.contiguous()
    q, k = rotate(q, slots, rope_base, chunk_size), rotate(k, slots, rope_base, chunk_size)
    out = causal_attention(q, k, v, keys, values, slots)
    fill = places.exit_position(fill, length) % chunk_size
    leaving = (open_chunk(k, keys, stops, fill, chunk_size), open_chunk(v, values, stops, fill, chunk_size))
    return out, KeyValueCache(*leaving, fill)
