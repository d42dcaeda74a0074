"""Chunk attention: causal softmax attention inside chunks of c tokens, with rotary positions that restart in each.

The softmax has scale 1: queries and keys come normalised. The scores are computed in rows of tiles up to the diagonal,
because values are wider than queries here, and the fused attention of PyTorch is slow for that.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .bins import pack_into_bins
from .boundaries import Boundaries, take
from .finite import any_seen, finite_part, is_finite
from .rotary import rope

TILE_SIZE = 256


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

    Returns:
        (B, L, H, dv), and the unfinished chunk at the exit.
    """
    fill = torch.zeros(len(q), dtype=torch.int64) if cache is None else cache.fill
    slots = chunk_slots(fill, boundaries or Boundaries(), q.shape[1], chunk_size)
    given = (slots, chunk_size, rope_base)
    out, leaving = _chunk_attention(q, k, v, *given, cache, boundaries, dropout, drop_keys)
    if is_finite(out, slots):
        return out, leaving
    finite = cache and cache._replace(values=finite_part(cache.values))
    out, _ = _chunk_attention(q, k, finite_part(v), *given, finite, boundaries, dropout, drop_keys)
    return out.masked_fill(spoilt(v, None if cache is None else cache.values, slots), math.nan), leaving


def chunk_slots(fill: Tensor, boundaries: Boundaries, length: int, chunk_size: int) -> Tensor:
    """(B, L) int64 on the CPU: place of each token in its chunk, counted on from the entry's `fill`; -1 at padding."""
    slots = boundaries.since_start(fill, length) % chunk_size
    return slots if boundaries.lengths is None else torch.where(boundaries.valid(length), slots, -1)


def spoilt(v: Tensor, cached: Tensor | None, slots: Tensor) -> Tensor:
    """Where attention sees a value that is not finite.

    Args:
        v: (B, L, H, dv).
        cached: (B, c, H, dv) of the unfinished chunks at the entry, or None.
        slots: (B, L) int64, place of each token in its chunk, -1 at padding.

    Returns:
        (B, L, H, dv) bool.
    """
    slots = slots.to(v.device)
    steps = torch.arange(v.shape[1], device=v.device)
    seen = any_seen(~torch.isfinite(v), torch.minimum(slots, steps))
    if cached is not None:
        used = torch.arange(cached.shape[1], device=v.device) < slots[:, :1]
        wrong = (~torch.isfinite(cached) & used[..., None, None]).any(1, keepdim=True)
        seen = seen | (wrong & (slots > steps)[..., None, None])
    return seen


def _chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slots: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: KeyValueCache | None,
    boundaries: Boundaries | None,
    dropout: float,
    drop_keys: bool,
) -> tuple[Tensor, KeyValueCache]:
    """chunk_attention, but a value that is not finite may reach tokens that do not see it."""
    batch, length = q.shape[:2]
    fill = torch.zeros(batch, dtype=torch.int64) if cache is None else cache.fill
    if boundaries is None and (cache is None or bool((fill == fill[0]).all())):
        places = slots[0].to(q.device)
        q, k = rope(q, places, rope_base, chunk_size), rope(k, places, rope_base, chunk_size)
        return _even(q, k, v, chunk_size, cache, 0 if cache is None else int(fill[0]), dropout, drop_keys)

    boundaries = boundaries or Boundaries()
    places = slots.clamp(min=0).to(q.device)
    q, k = rope(q, places, rope_base, chunk_size), rope(k, places, rope_base, chunk_size)
    keys, values = (None, None) if cache is None else (cache.keys, cache.values)
    bins = pack_into_bins(slots, chunk_size, q.device)
    kb, vb = bins.gather_keys(k, keys), bins.gather_keys(v, values)
    qb = take(q.flatten(0, 1), bins.queries)
    out = take(_tiles(qb, kb, vb, bins.low, bins.high, bins.longest, dropout, drop_keys).flatten(0, 1), bins.place)

    stops = torch.full_like(fill, length) if boundaries.lengths is None else boundaries.lengths
    fill = boundaries.exit_position(fill, length) % chunk_size
    keys, values = (_open_chunk(*given, stops, fill, chunk_size) for given in ((k, keys), (v, values)))
    return out, KeyValueCache(keys, values, fill)


def _open_chunk(piece: Tensor, cached: Tensor | None, stops: Tensor, fill: Tensor, chunk_size: int) -> Tensor:
    """(B, c, H, d): keys or values of the unfinished chunks at the exit, zero from slot `fill` on.

    Args:
        piece: (B, L, H, d).
        cached: (B, c, H, d) the unfinished chunks at the entry, or None for empty ones.
        stops: (B,) tokens of each row.
        fill: (B,) tokens of the unfinished chunk at the exit.
        chunk_size: c.
    """
    slot = torch.arange(chunk_size)
    token = (stops - fill)[:, None] + slot
    used = slot < fill[:, None]
    rows = torch.arange(len(fill))[:, None] * piece.shape[1]
    taken = take(piece.flatten(0, 1), torch.where(used & (token >= 0), rows + token, -1).to(piece.device))
    if cached is None:
        return taken
    return torch.where((used & (token < 0)).to(piece.device)[..., None, None], cached.to(piece.dtype), taken)


def _even(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    cache: KeyValueCache | None,
    fill: int,
    dropout: float,
    drop_keys: bool,
) -> tuple[Tensor, KeyValueCache]:
    """All rows stand at the same slot and run on: finish the open chunk, take the whole ones, begin the next."""
    length = q.shape[1]
    out = []
    open_k, open_v = k[:, :0], v[:, :0]
    if cache is not None and fill:
        open_k, open_v = cache.keys[:, :fill].to(k.dtype), cache.values[:, :fill].to(v.dtype)
    at = 0
    if fill:
        at = min(chunk_size - fill, length)
        open_k, open_v = torch.cat([open_k, k[:, :at]], 1), torch.cat([open_v, v[:, :at]], 1)
        out.append(causal_attention(q[:, :at], open_k, open_v, dropout, drop_keys))
    whole = (length - at) // chunk_size * chunk_size
    if whole:
        qs, ks, vs = (t[:, at : at + whole].unflatten(1, (-1, chunk_size)).flatten(0, 1) for t in (q, k, v))
        out.append(causal_attention(qs, ks, vs, dropout, drop_keys).reshape(len(q), whole, *v.shape[2:]))
        at += whole
    if at < length:
        open_k, open_v = k[:, at:], v[:, at:]
        out.append(causal_attention(q[:, at:], open_k, open_v, dropout, drop_keys))
    fill = (fill + length) % chunk_size
    padding = (0, 0, 0, 0, 0, chunk_size - fill)
    leaving = KeyValueCache(
        F.pad(open_k[:, :fill], padding), F.pad(open_v[:, :fill], padding), torch.full((len(q),), fill)
    )
    return out[0] if len(out) == 1 else torch.cat(out, 1), leaving


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, drop_keys: bool = False) -> Tensor:
    """Softmax attention with scale 1 of the last Lq of Lk tokens to everything up to themselves.

    Args:
        q: (B, Lq, H, dk).
        k: (B, Lk, H, dk), Lk at least Lq.
        v: (B, Lk, H, dv).
        dropout, drop_keys: as in chunk_attention.

    Returns:
        (B, Lq, H, dv).
    """
    queries, before = q.shape[1], k.shape[1] - q.shape[1]
    high = torch.arange(before, before + queries, device=q.device)[None]
    return _tiles(q, k, v, torch.zeros_like(high), high, np.arange(before, before + queries) + 1, dropout, drop_keys)


def _tiles(
    q: Tensor, k: Tensor, v: Tensor, low: Tensor, high: Tensor, longest: np.ndarray, dropout: float, drop_keys: bool
) -> Tensor:
    """Softmax attention of q (M, Q, H, dk) to the keys low..high (M or 1, Q) of k, v (M, K, H, .), in tiles of queries.

    `longest` (Q,) tells how many keys a query of any row may see, so that none further away is looked at.
    """
    rows = []
    for start in range(0, q.shape[1], TILE_SIZE):
        tile = slice(start, start + TILE_SIZE)
        width = int(longest[tile].max())
        key = torch.arange(width, device=q.device)
        visible = (key >= low[:, tile, None]) & (key <= high[:, tile, None])
        rows.append(_attend(q[:, tile], k[:, :width], v[:, :width], visible[:, None], dropout, drop_keys))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float, drop_keys: bool) -> Tensor:
    """Softmax attention of q (B, Lq, H, dk) to k, v (B, Lk, H, .) where `visible`, broadcast to (B, H, Lq, Lk)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if dropout and drop_keys:
        own = visible & ~F.pad(visible[..., 1:], (0, 1))  # the last visible key of each query
        shape = (*q.shape[:3], k.shape[2])
        visible = visible & (own | (torch.rand(shape, device=q.device) >= dropout))
    scores = q @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).to(v.dtype)
    if dropout and not drop_keys:
        weights = F.dropout(weights, dropout)
    return (weights @ v).transpose(1, 2)
