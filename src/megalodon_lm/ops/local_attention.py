"""Local attention: causal softmax attention to the last tokens of a document, as many as a window holds.

The attention of transformers: within a window of the beginning it is full causal attention. Beyond, the window slides,
so that time and memory grow with the length, and what is carried stays of one size.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .boundaries import Boundaries
from .finite import is_finite
from .rotary import Base, document_turns, rope
from .windowed_attention import Side, SlidingWindow, attend_in_windows, enter, joined, leave

TABLE = 1024  # positions whose angles are kept; those of later ones are composed
TILE_SIZE = 256  # queries


class LocalCache(NamedTuple):
    """Rotated keys and values (B, window, H, d) of the last tokens, one fewer than the window, then zeros.

    `fill` (B,), the entries used, and `position` (B,), the tokens of the document so far, are int64 and live on the
    CPU.
    """

    keys: Tensor
    values: Tensor
    fill: Tensor
    position: Tensor


@op(rounded=3)
def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    rope_base: Base,
    cache: LocalCache | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, LocalCache]:
    """Each token attends to the last `window` tokens of its document, itself counted, by rotated queries and keys.

    Args:
        q, k, v: (B, L, H, d), not yet rotated, L at least 1. The softmax has scale 1: q comes scaled.
        window: most tokens that one sees.
        rope_base: base of the rotary frequencies, or these; positions are those in the document.
        cache: what came before the piece, or None for nothing.
        boundaries: of the piece; padding yields 0.

    Returns:
        (B, L, H, d), and what comes before the next piece.
    """
    batch, length = q.shape[:2]
    keys, values, fill, position = cache or (None, None, None, torch.zeros(batch, dtype=torch.int64))
    sliding = SlidingWindow(window)
    entry = enter(sliding, fill, boundaries, batch, length)
    turns = document_turns(q, entry.boundaries.since_start(position, length), rope_base, TABLE)
    q, k = (rope(t, turns) for t in (q, k))
    if entry.start == 0 and length <= window:
        out = _fused(q, k, v)
    else:
        out = _in_tiles(q, (k, keys), (v, values), window, entry.slots)
    if not is_finite(out, entry.slots):  # hidden keys, which PyTorch's fused attention adds infinity to
        out = attend_in_windows(q, (k, keys), (v, values), sliding, entry)
    leaving = (leave(k, keys, sliding, entry), leave(v, values, sliding, entry), entry.leaving)
    return out, LocalCache(*leaving, entry.boundaries.exit_position(position, length))


def _fused(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None = None) -> Tensor:
    """PyTorch's attention, where `visible` is True; causal without it."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q, k, v, visible, is_causal=visible is None, scale=1.0).transpose(1, 2)


def _in_tiles(q: Tensor, keys: Side, values: Side, window: int, slots: Tensor) -> Tensor:
    """Tiles of queries, each against its own tile of keys and those before it that one of its queries may see."""
    size = min(TILE_SIZE, window)
    k, v = (joined(*side, slots) for side in (keys, values))
    length = q.shape[1]
    entries = k.shape[1] - length  # of the cache
    front = -entries % size
    ks, vs = (F.pad(t, (0, 0, 0, 0, front, 0)).split(size, 1) for t in (k, v))
    before = (entries + front) // size
    slots = slots.to(q.device)
    rows = []
    for i, queries in enumerate(q.split(size, 1)):
        last = before + i
        first = max(0, last - -(-(window - 1) // size))
        at = torch.arange(queries.shape[1], device=q.device) + size * (last - first)
        key = torch.arange(size * (last - first) + queries.shape[1], device=q.device)
        low = at - slots[:, size * i : size * (i + 1)].clamp(min=0)
        visible = (key >= low[..., None]) & (key <= at[:, None])
        seen = slice(first, last + 1)
        rows.append(_fused(queries, torch.cat(ks[seen], 1), torch.cat(vs[seen], 1), visible[:, None]))
    return torch.where((slots >= 0)[..., None, None], torch.cat(rows, 1), 0)
