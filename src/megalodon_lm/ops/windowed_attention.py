"""Softmax attention of each token to itself and a number of tokens before it: what all attention over chunks is.

A token's slot is how many tokens before it it sees, first of the piece, then of the cache at the entry. Slots rise by
one inside a chunk of c tokens, so that the tokens of a chunk see one run of keys; where a window slides they stay at
its size, and each token sees a run of its own. Three layouts bring queries to their
keys. Where all rows stand at one slot, chunks are slices. Else they lie in bins (bins.py), whose shapes depend on where
documents begin. In a graph of torch.compile no value may decide a shape: there a tile of queries is given as many keys
before it as a token can see, and its own; where a window slides, too.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .attention import attend, causal_attention
from .bins import pack_into_bins
from .boundaries import Boundaries, take
from .finite import any_seen, finite_part, is_finite
from .open_chunk import even_open_chunk, open_chunk

Side = tuple[Tensor, Tensor | None]  # keys or values of the piece, and of the cache at the entry
Drop = tuple[float, bool]  # dropout, drop_keys


class Window(NamedTuple):
    """What tokens see: their own chunk of `chunk_size` tokens, and up to `kept` ones of the chunks before it.

    `kept` is a multiple of the chunk's size.
    """

    chunk_size: int
    kept: int = 0

    @property
    def size(self) -> int:
        """Most tokens that one sees, itself counted; entries of a cache."""
        return self.chunk_size + self.kept

    def slots(self, position: Tensor) -> Tensor:
        """How many tokens before it a token sees, by how many come before it in its document."""
        place = position % self.chunk_size
        return place + (position - place).clamp(max=self.kept) if self.kept else place

    def slot(self, position: int) -> int:
        """`slots` of one number."""
        return position % self.chunk_size + min(position // self.chunk_size * self.chunk_size, self.kept)


class SlidingWindow(NamedTuple):
    """What tokens see: the last `size` tokens, themselves counted, of which a cache keeps all but one."""

    size: int

    def slots(self, position: Tensor) -> Tensor:
        """As of Window."""
        return position.clamp(max=self.size - 1)

    def slot(self, position: int) -> int:
        """`slots` of one number."""
        return min(position, self.size - 1)


AnyWindow = Window | SlidingWindow


class Entry(NamedTuple):
    """Where the tokens of a piece stand.

    Attributes:
        fill: (B,) int64 on the CPU, entries of the cache that the first token of each row would see.
        boundaries: of the piece.
        slots: (B, L) int64 on the CPU, how many tokens before it a token sees; -1 at padding.
        start: the slot from which all rows run on; None if they differ or, in a graph, may differ.
        leaving: (B,) int64 on the CPU, entries of the cache at the exit.
    """

    fill: Tensor
    boundaries: Boundaries
    slots: Tensor
    start: int | None
    leaving: Tensor


def enter(window: AnyWindow, fill: Tensor | None, boundaries: Boundaries | None, batch: int, length: int) -> Entry:
    """Where the tokens of a piece stand that comes after a cache of `fill` entries a row, None for no cache."""
    where = boundaries or Boundaries()
    filled = torch.zeros(batch, dtype=torch.int64) if fill is None else fill
    slots, leaving = token_slots(window, filled, where, length), window.slots(where.exit_position(filled, length))
    return Entry(filled, where, slots, _common_start(fill, boundaries), leaving)


def token_slots(window: AnyWindow, fill: Tensor, boundaries: Boundaries, length: int) -> Tensor:
    """(B, L) int64 on the CPU: how many tokens before it a token sees, after `fill` ones of a cache; -1 at padding."""
    slots = window.slots(boundaries.since_start(fill, length))
    return slots if boundaries.lengths is None else torch.where(boundaries.valid(length), slots, -1)


def _common_start(fill: Tensor | None, boundaries: Boundaries | None) -> int | None:
    if boundaries is not None:
        return None
    if fill is None:
        return 0
    if torch.compiler.is_compiling() or not len(fill) or (fill != fill[0]).any():
        return None
    return int(fill[0])


def attend_in_windows(
    q: Tensor, keys: Side, values: Side, window: AnyWindow, entry: Entry, drop: Drop = (0.0, False)
) -> Tensor:
    """Attention of each token to itself and `slot` tokens before it, 0 at padding; NaN where it sees one.

    Args:
        q: (B, L, H, dk), rotated, as are the keys.
        keys, values: (B, L, H, d) of the piece, and (B, window.size, H, d) of the cache.
        window: what tokens see.
        entry: from `enter`.
        drop: dropout, and whether scores are dropped before the softmax.

    Returns:
        (B, L, H, dv).
    """

    def run(values: Side) -> Tensor:
        if isinstance(window, SlidingWindow) or (entry.start is None and torch.compiler.is_compiling()):
            return _in_graph(q, keys, values, window, drop, entry.slots)
        if entry.start is not None:
            return _in_slices(q, keys, values, window, drop, entry.start)
        return _in_bins(q, keys, values, window, drop, entry.slots)

    out = run(values)
    if is_finite(out, entry.slots):
        return out
    piece, cached = values  # products with the zeros of hidden keys
    out = run((finite_part(piece), None if cached is None else finite_part(cached)))
    return out.masked_fill(spoilt(piece, cached, entry.slots), math.nan)


def leave(piece: Tensor, cached: Tensor | None, window: AnyWindow, entry: Entry) -> Tensor:
    """Keys or values (B, window.size, H, d) of the cache at the exit."""
    length = piece.shape[1]
    if entry.start is not None:
        return even_open_chunk(piece, cached, window.slot(entry.start + length), window.size, entry.start)
    moves = isinstance(window, SlidingWindow) or window.kept
    stops, moved = entry.boundaries.lengths, entry.fill if moves else None
    if stops is None:
        stops = torch.full_like(entry.fill, length)
    return open_chunk(piece, cached, stops, entry.leaving, window.size, moved)


def _span(side: Side, start: int, begin: int, end: int) -> Tensor:
    """Keys or values of the tokens begin..end of a piece, of which those below 0 end a cache of `start` entries."""
    piece, cached = side
    if begin >= 0:
        return piece[:, begin:end]
    assert cached is not None
    return torch.cat([cached[:, start + begin : start].to(piece.dtype), piece[:, :end]], 1)


def _in_slices(q: Tensor, keys: Side, values: Side, window: Window, drop: Drop, start: int) -> Tensor:
    """All rows stand at slot `start`: first those that see a window not yet full, then whole chunks, then the rest."""
    size, kept, length = window.chunk_size, window.kept, q.shape[1]
    opening = 0 if start == kept else min(window.size - start, length)
    closing = opening + (length - opening) // size * size
    out = []
    if opening:
        k, v = (_span(side, start, -start, opening) for side in (keys, values))
        out.append(causal_attention(q[:, :opening], k, v, *drop))
    if opening < closing:
        spans = (_span(side, start, opening - kept, closing) for side in (keys, values))
        ks, vs = (_overlapping(t.unflatten(1, (-1, size)), kept // size).flatten(0, 1) for t in spans)
        qs = q[:, opening:closing].unflatten(1, (-1, size)).flatten(0, 1)
        out.append(causal_attention(qs, ks, vs, *drop).unflatten(0, (len(q), -1)).flatten(1, 2))
    if closing < length:
        k, v = (_span(side, start, closing - kept, length) for side in (keys, values))
        out.append(causal_attention(q[:, closing:], k, v, *drop))
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _overlapping(chunks: Tensor, before: int) -> Tensor:
    """(B, n, c, H, d) to (B, n - before, (before + 1) c, H, d): each but the first ones, after those before it."""
    if not before:
        return chunks
    count = chunks.shape[1] - before
    return torch.cat([chunks[:, i : i + count] for i in range(before + 1)], 2)


def _in_bins(q: Tensor, keys: Side, values: Side, window: Window, drop: Drop, slots: Tensor) -> Tensor:
    """Chunks of all lengths side by side in bins."""
    bins = pack_into_bins(slots, window.chunk_size, window.kept, q.device)
    k, v = bins.gather_keys(*keys), bins.gather_keys(*values)
    q = take(q.flatten(0, 1), bins.queries)
    out = attend(q, k, v, bins.low, bins.high, bins.reach, None, *drop)
    return take(out.flatten(0, 1), bins.query_of)


def _in_graph(q: Tensor, keys: Side, values: Side, window: AnyWindow, drop: Drop, slots: Tensor) -> Tensor:
    """Cached keys moved, in each row, to end where its tokens begin, so that what a query sees lies in one run."""
    k, v = (joined(*side, slots) for side in (keys, values))
    length = q.shape[1]
    before = k.shape[1] - length
    slots = slots.to(q.device)
    high = torch.arange(before, before + length, device=q.device)[None]
    reach = range(before + 1, before + length + 1)
    out = attend(q, k, v, high - slots.clamp(min=0), high, reach, window.size, *drop)
    return torch.where((slots >= 0)[..., None, None], out, 0)


def joined(piece: Tensor, cached: Tensor | None, slots: Tensor) -> Tensor:
    """The entries of the cache that the first token of each row sees, moved to end where the piece begins, and it."""
    if cached is None:
        return piece
    size = cached.shape[1]
    entry = torch.arange(size) - size + slots[:, :1]
    rows = torch.where(entry < 0, -1, torch.arange(len(piece))[:, None] * size + entry).to(piece.device)
    return torch.cat([take(cached.flatten(0, 1), rows).to(piece.dtype), piece], 1)


def spoilt(v: Tensor, cached: Tensor | None, slots: Tensor) -> Tensor:
    """Where attention sees a value that is not finite.

    Args:
        v: (B, L, H, dv).
        cached: values (B, n, H, dv) of the cache at the entry, or None.
        slots: (B, L) int64, how many tokens before it a token sees, -1 at padding.

    Returns:
        (B, L, H, dv) bool.
    """
    wrong = ~torch.isfinite(joined(v, cached, slots))
    before = wrong.shape[1] - v.shape[1]
    return any_seen(wrong, torch.cat([slots.new_full((len(slots), before), -1), slots], 1))[:, before:]
