"""Chunk attention: causal softmax attention inside chunks of c tokens, with rotary positions that restart in each.

A token's slot is its place in its chunk, and says which tokens it sees: itself and as many before it, first of the
piece, then of the unfinished chunk at the entry. Three layouts bring queries to their keys. Where all rows stand at one
slot, chunks are slices. Else they lie in bins (bins.py), whose shapes depend on where documents begin. In a graph of
torch.compile no value may decide a shape: there a tile of queries is given the c keys before it and its own.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import attend, causal_attention
from .backend import op
from .bins import pack_into_bins
from .boundaries import Boundaries, take
from .finite import any_seen, finite_part, is_finite
from .open_chunk import even_open_chunk, open_chunk
from .rotary import rope


class KeyValueCache(NamedTuple):
    """Rotated keys (B, c, H, dk) and values (B, c, H, dv) of the unfinished chunk, zero from slot `fill` on.

    `fill` is (B,) int64 and lives on the CPU: it decides shapes.
    """

    keys: Tensor
    values: Tensor
    fill: Tensor


Side = tuple[Tensor, Tensor | None]  # keys or values of the piece, and those of the unfinished chunk at the entry
Drop = tuple[float, bool]  # dropout, drop_keys


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
    length = q.shape[1]
    cached_keys, cached_values, fill = cache or (None, None, torch.zeros(len(q), dtype=torch.int64))
    where = boundaries or Boundaries()
    slots = chunk_slots(fill, where, length, chunk_size)
    start = _common_start(cache, boundaries)
    places = (slots.clamp(min=0) if start is None else slots[0]).to(q.device)
    q, k = (rope(t, places, rope_base, chunk_size) for t in (q, k))

    def run(v: Tensor, cached_values: Tensor | None) -> Tensor:
        given = (q, (k, cached_keys), (v, cached_values), chunk_size, (dropout, drop_keys))
        if start is not None:
            return _in_slices(*given, start)
        return (_in_windows if torch.compiler.is_compiling() else _in_bins)(*given, slots)

    out = run(v, cached_values)
    if not is_finite(out, slots):  # products with the zeros of hidden keys
        out = run(finite_part(v), None if cached_values is None else finite_part(cached_values))
        out = out.masked_fill(spoilt(v, cached_values, slots), math.nan)

    fill = where.exit_position(fill, length) % chunk_size

    def leave(piece: Tensor, cached: Tensor | None) -> Tensor:
        if start is not None:
            return even_open_chunk(piece, cached, (start + length) % chunk_size, chunk_size)
        stops = torch.full_like(fill, length) if where.lengths is None else where.lengths
        return open_chunk(piece, cached, stops, fill, chunk_size)

    return out, KeyValueCache(leave(k, cached_keys), leave(v, cached_values), fill)


def chunk_slots(fill: Tensor, boundaries: Boundaries, length: int, chunk_size: int) -> Tensor:
    """(B, L) int64 on the CPU: place of each token in its chunk, counted on from the entry's `fill`; -1 at padding."""
    slots = boundaries.since_start(fill, length) % chunk_size
    return slots if boundaries.lengths is None else torch.where(boundaries.valid(length), slots, -1)


def _common_start(cache: KeyValueCache | None, boundaries: Boundaries | None) -> int | None:
    """The slot from which all rows run on; None if they differ or, in a graph, may differ."""
    if boundaries is not None:
        return None
    if cache is None:
        return 0
    if torch.compiler.is_compiling() or (cache.fill != cache.fill[0]).any():
        return None
    return int(cache.fill[0])


def _in_slices(q: Tensor, keys: Side, values: Side, chunk_size: int, drop: Drop, start: int) -> Tensor:
    """All rows stand at slot `start`: finish the open chunk, take the whole ones together, begin the next."""
    (k, cached_keys), (v, cached_values), length = keys, values, q.shape[1]
    ending = min(-start % chunk_size, length)
    whole = (length - ending) // chunk_size * chunk_size
    out = []
    if ending:
        assert cached_keys is not None
        assert cached_values is not None
        k_open = torch.cat([cached_keys[:, :start].to(k.dtype), k[:, :ending]], 1)
        v_open = torch.cat([cached_values[:, :start].to(v.dtype), v[:, :ending]], 1)
        out.append(causal_attention(q[:, :ending], k_open, v_open, *drop))
    if whole:
        parts = (t[:, ending : ending + whole] for t in (q, k, v))
        qs, ks, vs = (t.unflatten(1, (-1, chunk_size)).flatten(0, 1) for t in parts)
        out.append(causal_attention(qs, ks, vs, *drop).unflatten(0, (len(q), -1)).flatten(1, 2))
    if ending + whole < length:
        q, k, v = (t[:, ending + whole :] for t in (q, k, v))
        out.append(causal_attention(q, k, v, *drop))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _in_bins(q: Tensor, keys: Side, values: Side, chunk_size: int, drop: Drop, slots: Tensor) -> Tensor:
    """Chunks of all lengths side by side in bins."""
    bins = pack_into_bins(slots, chunk_size, q.device)
    k, v = bins.gather_keys(*keys), bins.gather_keys(*values)
    q = take(q.flatten(0, 1), bins.queries)
    out = attend(q, k, v, bins.low, bins.high, bins.reach, None, *drop)
    return take(out.flatten(0, 1), bins.query_of)


def _in_windows(q: Tensor, keys: Side, values: Side, chunk_size: int, drop: Drop, slots: Tensor) -> Tensor:
    """Cached keys moved, in each row, to end where its tokens begin, so that what a query sees lies in one run."""
    (k, cached_keys), (v, cached_values) = keys, values
    before, length = 0, q.shape[1]
    if cached_keys is not None and cached_values is not None:
        before = chunk_size
        slot = torch.arange(chunk_size) - chunk_size + slots[:, :1]  # the first token comes after so many
        rows = torch.where(slot < 0, -1, torch.arange(len(q))[:, None] * chunk_size + slot).to(q.device)
        k = torch.cat([take(cached_keys.flatten(0, 1), rows).to(k.dtype), k], 1)
        v = torch.cat([take(cached_values.flatten(0, 1), rows).to(v.dtype), v], 1)
    slots = slots.to(q.device)
    high = torch.arange(before, before + length, device=q.device)[None]
    reach = range(before + 1, before + length + 1)
    out = attend(q, k, v, high - slots.clamp(min=0), high, reach, chunk_size, *drop)
    return torch.where((slots >= 0)[..., None, None], out, 0)


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
