"""Attention over chunks on the CPU: the same as the portable one, out of operators of compiled code."""

from typing import Any

import torch
from torch import Tensor

from ..boundaries import Boundaries
from ..windowed_attention import AnyWindow, Window, token_slots
from .causal_attention import causal_attention
from .open_chunk import open_chunk
from .rotary import rotate


def fits(
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
    """Whether kernels take the arguments of an attention: q, k and v of one type, without dropout."""
    return not dropout and q.dtype == k.dtype == v.dtype


def windowed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: Window,
    rope_base: float,
    cache: tuple[Tensor, Tensor, Tensor] | None,
    boundaries: Boundaries | None,
    heads_without_rope: int,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rotate queries and keys, attend, and leave a cache.

    Args:
        q, k, v: (B, L, H, d), not yet rotated.
        window: what tokens see.
        rope_base: base of the rotary frequencies.
        cache: keys and values (B, window.size, H, d) at the entry, and (B,) how many are used; or None for none.
        boundaries: of the piece.
        heads_without_rope: as many heads at the end are not rotated.
        positions: (B, L) int64 to rotate by; None for the slots of the tokens.

    Returns:
        (B, L, H, dv), and the cache at the exit.
    """
    if positions is None:
        fill = torch.zeros(len(q), dtype=torch.int64) if cache is None else cache[2]
        positions = token_slots(window, fill, boundaries or Boundaries(), q.shape[1])
    turn = (positions, rope_base, window.chunk_size, heads_without_rope)
    return attend_and_leave(rotate(q, *turn), rotate(k, *turn), v, window, cache, boundaries)


def attend_and_leave(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: AnyWindow,
    cache: tuple[Tensor, Tensor, Tensor] | None,
    boundaries: Boundaries | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rotated queries and keys; arguments and results as in windowed_attention."""
    batch, length = q.shape[:2]
    keys, values, fill = None, None, torch.zeros(batch, dtype=torch.int64)
    if cache is not None:
        keys, values, fill = cache[0].to(k.dtype).contiguous(), cache[1].to(v.dtype).contiguous(), cache[2]
    where = boundaries or Boundaries()
    slots = token_slots(window, fill, where, length)
    stops = torch.full_like(fill, length) if where.lengths is None else where.lengths
    v = v.contiguous()
    out = causal_attention(q, k, v, keys, values, slots)
    leaving = window.slots(where.exit_position(fill, length))
    places = torch.stack([stops, leaving, fill], 1)
    return out, open_chunk(k, keys, places, window.size), open_chunk(v, values, places, window.size), leaving
