"""Local attention on the CPU: the same function as the portable one, out of operators of compiled code."""

import torch
from torch import Tensor

from .. import local_attention as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..local_attention import LocalCache
from ..rotary import Base, document_turns, rope
from ..windowed_attention import SlidingWindow, enter
from .rotary import rotate
from .windowed_attention import attend_and_leave


def fits(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> bool:
    """Whether q, k and v are of one type."""
    return q.dtype == k.dtype == v.dtype


@implements(portable.local_attention, "cpu", fits)
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    rope_base: Base,
    cache: LocalCache | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, LocalCache]:
    """As megalodon_lm.ops.local_attention.local_attention; for q, k and v of one type."""
    batch, length = q.shape[:2]
    where = boundaries or Boundaries()
    position = torch.zeros(batch, dtype=torch.int64) if cache is None else cache.position
    places = where.since_start(position, length)
    if isinstance(rope_base, tuple):
        turns = document_turns(q, places, rope_base, portable.TABLE)
        q, k = rope(q, turns), rope(k, turns)
    else:
        q, k = (rotate(t, places, rope_base, portable.TABLE) for t in (q, k))
    held = None if cache is None else (cache.keys, cache.values, cache.fill)
    entry = enter(SlidingWindow(window), None if cache is None else cache.fill, boundaries, batch, length)
    out, *leaving = attend_and_leave(q, k, v, window, held, entry)
    return out, LocalCache(*leaving, where.exit_position(position, length))
