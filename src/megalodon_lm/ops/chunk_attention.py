"""Chunk attention: causal softmax attention inside chunks of c tokens, with rotary positions that restart in each.

Scores depend on differences of positions alone: positions in the document would give the same.
"""

from typing import NamedTuple

from torch import Tensor

from .backend import op
from .boundaries import Boundaries
from .rotary import rope, slot_turns
from .windowed_attention import Window, attend_in_windows, enter, leave


class KeyValueCache(NamedTuple):
    """Rotated keys (B, c, H, dk) and values (B, c, H, dv) of the unfinished chunk, zero from slot `fill` on.

    `fill` is (B,) int64 and lives on the CPU: it decides shapes.
    """

    keys: Tensor
    values: Tensor
    fill: Tensor


@op(rounded=3)
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
    """Each token attends to the tokens of its own chunk up to itself.

    Args:
        q, k: (B, L, H, dk), not yet rotated, L at least 1.
        v: (B, L, H, dv).
        chunk_size: c. Chunks and rotary positions restart at each document.
        rope_base: base of the rotary frequencies.
        cache: the unfinished chunk at the entry, or None for an empty one.
        boundaries: of the piece; padding yields 0.
        dropout: probability, already 0 outside training.
        drop_keys: drop scores before the softmax (DropKey, the authors' fused kernel) and not weights after it. A
            token's own key is never dropped.
        heads_without_rope: as many heads at the end are not rotated.

    Returns:
        (B, L, H, dv), and the unfinished chunk at the exit.
    """
    batch, length = q.shape[:2]
    keys, values, fill = cache or (None, None, None)
    window = Window(chunk_size)
    entry = enter(window, fill, boundaries, batch, length)
    places = (entry.slots.clamp(min=0) if entry.start is None else entry.slots[0]).to(q.device)
    q, k = (rope(t, slot_turns(t, places, rope_base, chunk_size), heads_without_rope) for t in (q, k))
    out = attend_in_windows(q, (k, keys), (v, values), window, entry, (dropout, drop_keys))
    return out, KeyValueCache(leave(k, keys, window, entry), leave(v, values, window, entry), entry.leaving)
