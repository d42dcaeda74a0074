"""Adaptive working memory: a matrix M per head that absorbs whole chunks, and that tokens read some chunks later.

A chunk changes M by an affine map: M' = M + W^T (v - k~ M) - rho M with W = exp(k - log_sum'), whose sum over the chunk
is rho. So all products with the chunk's tokens are batched over the chunks of a piece, and what goes from chunk to
chunk is one small product, M' = M + (W^T v - (diag(rho) + W^T k~) M). What has no chunk before it in its document
meets M = 0 and rho = 1, without an infinity anywhere.

Where all rows stand at one place of their chunks, chunks are views of the piece. Else they are gathered: a list of the
chunks that end in each row, and the tokens after each of them, in shapes that need not depend on where documents begin.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, take
from .windowed_attention import Window, enter, leave


class MemoryState(NamedTuple):
    """What has been absorbed, and the unfinished chunk; all zeros where nothing was read.

    Attributes:
        keys: (B, c, H, dk) of the unfinished chunk, as they were given, zero from slot `fill` on.
        fill: (B,) int64 on the CPU.
        memory: (B, lag, H, dk, dv) in float32 or better: M as the last `lag` chunks left it, the newest last; zero
            where there was no such chunk. The current chunk reads the first one.
        log_sum: (B, H, dk) float64, logarithm of the sum of the exponentials of all keys that were absorbed.
        chunks: (B,) int64 on the CPU, chunks absorbed of this document.
    """

    keys: Tensor
    fill: Tensor
    memory: Tensor
    log_sum: Tensor
    chunks: Tensor


class ValueCache(Protocol):
    """What is taken of attention's cache, be it a KeyValueCache or a SlidingCache."""

    @property
    def values(self) -> Tensor:
        """(B, n, H, dv), the newest last, as many as `fill` says."""

    @property
    def fill(self) -> Tensor:
        """(B,) int64 on the CPU."""


class Places(NamedTuple):
    """Where the chunks that end in a piece lie, and which tokens read what; every tensor is on the CPU.

    Attributes:
        ended: (B,) chunks that end in each row.
        keys: (B, K, c) int64, the tokens of each of them, c added, so that those below c are slots of the unfinished
            chunk at the entry; -1 where a row has fewer chunks.
        first: (B, K) bool, it is the first of its document.
        queries: (B, G, W) token of each slot of group g: those that read M number g of the entry's and the piece's own
            ones in a row; -1 for none.
        read: (B, L) slot of each token in the groups of its row, -1 where it reads nothing.
    """

    ended: Tensor
    keys: Tensor
    first: Tensor
    queries: Tensor
    read: Tensor


@op(rounded=3)
def adaptive_memory(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    lag: int,
    state: MemoryState | None = None,
    cache: ValueCache | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, MemoryState]:
    """Each token reads what its document had absorbed `lag` chunks before its own; complete chunks are absorbed.

    Args:
        q, k: (B, L, H, dk), before their softmax, L at least 1.
        v: (B, L, H, dv).
        chunk_size: c. Chunks are counted from the start of each document.
        lag: chunk j reads M after chunk j - lag; at least 1.
        state: at the entry, or None for an empty one.
        cache: of attention at the entry, which ends with the values of the unfinished chunk; None where there is none.
        boundaries: of the piece; documents begin with an empty memory, padding yields 0.

    Returns:
        (B, L, H, dv) in the type of v, and the state at the exit.
    """
    length, wide, window = q.shape[1], torch.promote_types(q.dtype, torch.float32), Window(chunk_size)
    old = empty_state(k, v, chunk_size, lag) if state is None else state
    entry = enter(window, None if state is None else state.fill, boundaries, len(q), length)
    position = old.chunks * chunk_size + old.fill
    leaving = entry.boundaries.exit_position(position, length)
    fill, chunks = leaving % chunk_size, leaving // chunk_size
    reading = q.softmax(-1, dtype=wide).to(v.dtype)
    memories = [*old.memory.to(wide).unbind(1)]

    if entry.start is not None:
        log_sum, values = old.log_sum.double(), v
        ended = (entry.start + length) // chunk_size
        if ended:
            if entry.start:
                values = torch.cat([unfinished_values(cache, old.fill, chunk_size)[:, : entry.start].to(v.dtype), v], 1)
            keys = torch.cat([old.keys[:, : entry.start].to(k.dtype), k], 1) if entry.start else k
            keys, values = (t[:, : ended * chunk_size].unflatten(1, (ended, -1)) for t in (keys, values))
            first = (old.chunks == 0)[:, None] & (torch.arange(ended) == 0)
            made, log_sums = _absorb(keys, values, memories[-1], log_sum, first)
            memories, log_sum = memories + made, log_sums[:, -1]
        empty = lag if state is None else lag - int(old.chunks.max())
        out = _read_evenly(reading, memories, chunk_size, entry.start, empty)
        memory = torch.stack(memories[-lag:], 1) if ended else old.memory.to(wide)
    else:
        places = find_places(position, entry.boundaries, length, chunk_size, lag)
        log_sums = old.log_sum[:, None].double()
        if places.keys.shape[1]:
            cached = v.new_zeros(len(v), chunk_size, *v.shape[2:])
            if cache is not None:
                cached = unfinished_values(cache, old.fill, chunk_size)
            keys, values = (_gathered(*pair, places.keys) for pair in ((k, old.keys), (v, cached)))
            made, totals = _absorb(keys, values, memories[-1], old.log_sum, places.first)
            memories, log_sums = memories + made, torch.cat([log_sums, totals], 1)
        stacked = torch.stack(memories, 1)
        out = _read_groups(reading, stacked.to(v.dtype), places)
        rows = torch.arange(len(q))[:, None]
        memory = stacked[rows, places.ended[:, None] + torch.arange(lag)]
        there = (chunks[:, None] >= torch.arange(lag, 0, -1)).to(q.device)
        memory = torch.where(there[..., None, None, None], memory, 0)
        log_sum = torch.where((chunks > 0).to(q.device)[:, None, None], log_sums[rows[:, 0], places.ended], 0)
    keys = leave(k, None if state is None else state.keys, window, entry)
    return out, MemoryState(keys, fill, memory, log_sum, chunks)


def absorb(keys: Tensor, values: Tensor, memory: Tensor, log_sum: Tensor, chunks: Tensor) -> tuple[Tensor, Tensor]:
    """Absorb one chunk of each row: what happens when a chunk is complete.

    Args:
        keys: (B, c, H, dk), before their softmax.
        values: (B, c, H, dv).
        memory: (B, H, dk, dv) as the chunk before left it.
        log_sum: (B, H, dk).
        chunks: (B,) int64 on the CPU, chunks absorbed before; where none were, memory and log_sum are not looked at.

    Returns:
        memory and log_sum after it.
    """
    made, log_sums = _absorb(keys[:, None], values[:, None], memory, log_sum, (chunks == 0)[:, None])
    return made[0], log_sums[:, 0]


def _absorb(
    keys: Tensor, values: Tensor, memory: Tensor, log_sum: Tensor, first: Tensor
) -> tuple[list[Tensor], Tensor]:
    """Absorb K chunks in a row.

    Args:
        keys: (B, K, c, H, dk).
        values: (B, K, c, H, dv).
        memory, log_sum: (B, H, dk, dv) and (B, H, dk) at the entry.
        first: (B, K) bool on the CPU, the chunk is the first of its document.

    Returns:
        M after each chunk, K times (B, H, dk, dv), and log_sum after each (B, K, H, dk).
    """
    wide = memory.dtype
    keys, log_sum = keys.to(wide), log_sum.double()
    predicting = keys.softmax(-1).to(values.dtype)
    highest = keys.detach().amax(2, keepdim=True)
    weights = (keys - highest).exp()
    sums, highest = weights.sum(2), highest.squeeze(2).double()
    log_sums = _running(highest + sums.double().log(), log_sum, first.to(keys.device))
    scale = (highest - log_sums).exp().to(wide)
    weights = weights.to(values.dtype).permute(0, 1, 3, 4, 2)
    added = scale[..., None] * (weights @ values.transpose(2, 3)).to(wide)
    taken = scale[..., None] * (weights @ predicting.transpose(2, 3)).to(wide) + _diagonal(scale * sums)

    made = []
    known = not torch.compiler.is_compiling()
    for n, (add, take_away) in enumerate(zip(added.unbind(1), taken.unbind(1), strict=True)):
        if known and first[:, n].all():
            memory = add
        else:
            if not known or first[:, n].any():
                begins = first[:, n].to(memory.device)[:, None, None, None]
                memory, take_away = (torch.where(begins, 0, t) for t in (memory, take_away))
            memory = memory + (add - take_away @ memory)
        made.append(memory)
    return made, log_sums


def _diagonal(x: Tensor) -> Tensor:
    """(..., n) to (..., n, n); torch.diag_embed warns in inductor's backward."""
    return x[..., None] * torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)


def _running(logs: Tensor, entry: Tensor, first: Tensor) -> Tensor:
    """Logarithms of running sums over chunks (B, K, H, dk), of each document's own; the entry is that of the first."""
    document = first.cumsum(1)[..., None, None]
    step = 1
    while step < logs.shape[1]:
        same = document[:, step:] == document[:, :-step]
        joined = torch.where(same, torch.logaddexp(logs[:, step:], logs[:, :-step]), logs[:, step:])
        logs, step = torch.cat([logs[:, :step], joined], 1), 2 * step
    return torch.where(document == 0, torch.logaddexp(logs, entry[:, None]), logs)


def empty_state(k: Tensor, v: Tensor, chunk_size: int, lag: int) -> MemoryState:
    """The state of nothing."""
    batch, _, heads, dim = k.shape
    memory = v.new_zeros(batch, lag, heads, dim, v.shape[-1], dtype=torch.promote_types(v.dtype, torch.float32))
    none = torch.zeros(batch, dtype=torch.int64)
    log_sum = k.new_zeros(batch, heads, dim, dtype=torch.float64)
    return MemoryState(k.new_zeros(batch, chunk_size, heads, dim), none, memory, log_sum, none)


def unfinished_values(cache: ValueCache | None, fill: Tensor, chunk_size: int) -> Tensor:
    """(B, c, H, dv): the `fill` newest values of attention's cache, from slot 0 on; anything after them."""
    assert cache is not None, "an unfinished chunk has values"
    values, before = cache.values, cache.fill - fill
    if values.shape[1] == chunk_size:
        return values
    if not torch.compiler.is_compiling() and (before == before[0]).all():
        return values[:, int(before[0]) :][:, :chunk_size]
    slots = (before[:, None] + torch.arange(chunk_size)).clamp(max=values.shape[1] - 1)
    return values[torch.arange(len(values))[:, None], slots]


def _gathered(piece: Tensor, cached: Tensor, places: Tensor) -> Tensor:
    """(B, K, c, H, d): the chunks at `places`; see Places."""
    both = torch.cat([cached.to(piece.dtype), piece], 1)
    rows = torch.arange(len(both))[:, None, None] * both.shape[1]
    return take(both.flatten(0, 1), torch.where(places < 0, -1, rows + places).to(piece.device))


def _read(q: Tensor, memories: Tensor) -> Tensor:
    """Groups of tokens (B, G, W, H, dk), each with its M (B, G, H, dk, dv): (B, G, W, H, dv)."""
    return (q.transpose(2, 3) @ memories).transpose(2, 3)


def _read_evenly(q: Tensor, memories: list[Tensor], chunk_size: int, start: int, empty: int) -> Tensor:
    """What tokens (B, L, H, dk) read that all run on from one place; the first `empty` memories are known to be 0."""
    length = q.shape[1]
    ending = min(-start % chunk_size, length)
    whole = (length - ending) // chunk_size * chunk_size
    out, begin, group = [], 0, 0
    for tokens, groups in ((ending, 1), (whole, whole // chunk_size), (length - ending - whole, 1)):
        if tokens == 0:
            continue
        skipped = min(max(empty - group, 0), groups)
        if skipped:
            nothing = min(skipped * chunk_size, tokens)
            out.append(q.new_zeros(len(q), nothing, q.shape[2], memories[0].shape[-1]))
        if skipped < groups:
            given = q[:, begin : begin + tokens].unflatten(1, (groups, -1))[:, skipped:]
            theirs = memories[group + skipped : group + groups]
            read = (torch.stack(theirs, 1) if len(theirs) > 1 else theirs[0][:, None]).to(q.dtype)
            out.append(_read(given, read).flatten(1, 2))
        begin, group = begin + tokens, group + groups
    return out[0] if len(out) == 1 else torch.cat(out, 1)


def _read_groups(q: Tensor, memories: Tensor, places: Places) -> Tensor:
    """What tokens (B, L, H, dk) read in the groups of `places`."""
    queries, read = places.queries, places.read
    rows = torch.arange(len(q))[:, None]
    index = torch.where(queries < 0, -1, rows[..., None] * q.shape[1] + queries)
    out = _read(take(q.flatten(0, 1), index.to(q.device)), memories[:, : queries.shape[1]])
    slots = torch.where(read < 0, -1, rows * queries[0].numel() + read)
    return take(out.flatten(0, 2), slots.to(q.device))


def find_places(position: Tensor, boundaries: Boundaries, length: int, chunk_size: int, lag: int) -> Places:
    """Find the chunks of a piece; only outside a graph do shapes tell how many there are.

    Args:
        position: (B,) tokens of the continued document before the piece.
        boundaries: of the piece.
        length: L.
        chunk_size: c.
        lag: of what is read.
    """
    since = boundaries.since_start(position, length)
    valid = torch.ones_like(since, dtype=torch.bool) if boundaries.lengths is None else boundaries.valid(length)
    ends = valid & (since % chunk_size == chunk_size - 1)
    reads = valid & (since >= lag * chunk_size)
    count, steps = ends.sum(1), torch.arange(length)
    most, width = (chunk_size - 1 + length) // chunk_size, min(chunk_size, length)
    if not torch.compiler.is_compiling():
        most = int(count.max())
    end = (~ends).to(torch.int8).argsort(dim=1, stable=True)[:, :most]  # the token that ends each chunk
    exists = torch.arange(most) < count[:, None]
    slots = torch.arange(chunk_size)
    token = end[..., None] - (chunk_size - 1) + slots
    keys = torch.where(token < 0, slots, token + chunk_size)
    first = since.gather(1, end) == chunk_size - 1

    group = ends.cumsum(1) - ends.to(torch.int64)  # chunks of the row that ended before each token
    begin = torch.cat([torch.zeros_like(count)[:, None], end + 1], 1)  # the first token after each
    queries = (begin[..., None] + torch.arange(width)).clamp(max=length - 1)
    flat = queries.flatten(1)
    theirs = group.gather(1, flat).view_as(queries) == torch.arange(most + 1)[:, None]
    inside = begin[..., None] + torch.arange(width) < length
    used = theirs & inside & reads.gather(1, flat).view_as(queries)
    return Places(
        ended=count,
        keys=torch.where(exists[..., None], keys, -1),
        first=first & exists,
        queries=torch.where(used, queries, -1),
        read=torch.where(reads, group * width + steps - begin.gather(1, group), -1),
    )
