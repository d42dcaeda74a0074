"""Sliding chunk attention: a token sees its own chunk of c tokens up to itself, and all of the chunk before it.

So it sees c + 1 to 2 c tokens, and time grows with the length. Rotary positions are those in the document, since keys
stay in the cache from one chunk to the next. Source: Ma et al. 2026 (Gecko, arXiv 2601.06463).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries
from .rotary import document_turns, rope
from .windowed_attention import Window, attend_in_windows, enter, leave


class SlidingCache(NamedTuple):
    """Rotated keys (B, 2c, H, dk) and values (B, 2c, H, dv) from the start of the previous chunk on, then zeros.

    `fill` (B,), the entries used, and `position` (B,), the tokens of the document so far, are int64 and live on the
    CPU. With p tokens so far, fill is p in the first chunk, then c + p % c.
    """

    keys: Tensor
    values: Tensor
    fill: Tensor
    position: Tensor


@op(rounded=3)
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
    """Each token attends to the tokens of its own chunk up to itself, and to those of the chunk before.

    Args:
        q, k: (B, L, H, dk), not yet rotated, L at least 1.
        v: (B, L, H, dv).
        chunk_size: c. Chunks and rotary positions restart at each document.
        rope_base: base of the rotary frequencies.
        cache: what came before the piece, or None for nothing.
        boundaries: of the piece; padding yields 0.
        dropout: probability, already 0 outside training.
        drop_keys: as for chunk_attention.
        heads_without_rope: as many heads at the end are not rotated.

    Returns:
        (B, L, H, dv), and what comes before the next piece.
    """
    batch, length = q.shape[:2]
    keys, values, fill, position = cache or (None, None, None, torch.zeros(batch, dtype=torch.int64))
    window = Window(chunk_size, chunk_size)
    entry = enter(window, fill, boundaries, batch, length)
    places = entry.boundaries.since_start(position, length)
    turns = document_turns(q, places, rope_base, chunk_size)
    q, k = (rope(t, turns, heads_without_rope) for t in (q, k))
    out = attend_in_windows(q, (k, keys), (v, values), window, entry, (dropout, drop_keys))
    leaving = (leave(k, keys, window, entry), leave(v, values, window, entry), entry.leaving)
    return out, SlidingCache(*leaving, entry.boundaries.exit_position(position, length))
