"""Attention over chunks on the CPU: the same as the portable one, out of operators of compiled code."""

from typing import Any

import torch
from torch import Tensor

from ..boundaries import Boundaries
from ..windowed_attention import Entry, Window, enter
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
    entry = enter(window, None if cache is None else cache[2], boundaries, *q.shape[:2])
    turn = (entry.slots if positions is None else positions, rope_base, window.chunk_size, heads_without_rope)
    return attend_and_leave(rotate(q, *turn), rotate(k, *turn), v, window.size, cache, entry)


def attend_and_leave(
    q: Tensor, k: Tensor, v: Tensor, size: int, cache: tuple[Tensor, Tensor, Tensor] | None, entry: Entry
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of rotated queries and keys, to the cache's `size` tokens; arguments and results as in windowed_attention."""
    keys, values = None, None
    if cache is not None:
        keys, values = cache[0].to(k.dtype).contiguous(), cache[1].to(v.dtype).contiguous()
    lengths = entry.boundaries.lengths
    stops = torch.full_like(entry.fill, q.shape[1]) if lengths is None else lengths
    v = v.contiguous()
    out = causal_attention(q, k, v, keys, values, entry.slots)
    places = torch.stack([stops, entry.leaving, entry.fill], 1)
    return out, open_chunk(k, keys, places, size), open_chunk(v, values, places, size), entry.leaving
