"""Chunks of packed and ragged rows laid side by side in bins, so that attention costs what the documents cost.

The tokens of a chunk stay together, and see themselves and the keys before them alone, which lie in the entry cache, or
in the piece where a chunk sees the one before it: those are laid beside both. Chunks go into bins in order, as many as
fit into each: a bin is as wide as the most keys of a chunk, or a little wider than few.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .boundaries import take

MERGED_KEYS = 128  # short chunks are taken together up to so many keys


@dataclass(frozen=True)
class Bins:
    """M bins of up to K keys and Q queries; every field is on the device of the piece."""

    keys: Tensor  # (M, K) token b * L + t of each key, -1 for a cached one or none
    queries: Tensor  # (M, Q) token of each query, -1 for none
    low: Tensor  # (M, Q) first key that a query sees
    high: Tensor  # (M, Q) last one, its own
    query_of: Tensor  # (B, L) query m * Q + i of each token, -1 at padding
    into: Tensor  # (R,) key m * K + j of each cached key
    cached: Tensor  # (R,) row of the cache b * n + entry that goes there
    reach: list[int]  # (Q,) for each query, the key after the last one that it sees in any bin

    def gather_keys(self, piece: Tensor, cache: Tensor | None) -> Tensor:
        """Keys or values (B, L, ...) and those of the entry cache (B, n, ...) to (M, K, ...), zero where none is."""
        keys = take(piece.flatten(0, 1), self.keys)
        if cache is None or not len(self.into):
            return keys
        rows = cache.flatten(0, 1)[self.cached].to(keys.dtype)
        return keys.flatten(0, 1).index_copy(0, self.into, rows).view_as(keys)


def pack_into_bins(slots: Tensor, chunk_size: int, kept: int, device: torch.device) -> Bins:
    """Lay the chunks of a piece into bins.

    Args:
        slots: (B, L) int64 on the CPU, how many tokens before it a token sees; -1 at padding.
        chunk_size: c.
        kept: tokens of the chunks before its own that a token may see; a cache has c + kept entries.
        device: where the result lives.
    """
    length = slots.shape[1]
    slot_of = slots.numpy()
    begins = (slot_of == 0) | (slot_of == kept)
    begins[:, :1] |= slot_of[:, :1] >= 0
    tokens = np.flatnonzero(slot_of >= 0)
    firsts = np.flatnonzero(begins)  # token that begins each run of a chunk
    run = begins.reshape(-1)[tokens].cumsum() - 1  # of each token
    row, column = np.divmod(firsts, max(length, 1))
    entries = slot_of[row, 0]  # of the cache that are used, of the row of each run
    slot_of = slot_of.reshape(-1)
    before = slot_of[firsts]  # keys before each run
    from_cache = np.maximum(before - column, 0)
    num_tokens = np.bincount(run, minlength=len(firsts))
    num_keys = before + num_tokens
    key_ends, token_ends = num_keys.cumsum(), num_tokens.cumsum()
    key_starts, token_starts = key_ends - num_keys, token_ends - num_tokens

    capacity = max(int(num_keys.max(initial=1)), min(chunk_size + kept, MERGED_KEYS))
    most_tokens = max(int(num_tokens.max(initial=1)), capacity * chunk_size // (chunk_size + kept))
    following = np.searchsorted(key_ends, key_starts + capacity, side="right")
    following = np.minimum(following, np.searchsorted(token_ends, token_starts + most_tokens, side="right"))
    heads = [0]  # first run of each bin; one bin even for nothing
    while heads[-1] < len(firsts) and following[heads[-1]] < len(firsts):
        heads.append(int(following[heads[-1]]))
    edges = np.array([*heads, len(firsts)])
    bin_of = np.repeat(np.arange(len(heads)), np.diff(edges))  # of each run
    key_at = key_starts - key_starts[edges[bin_of]]  # first key of each run in its bin
    width = int(np.max(key_at + num_keys, initial=1))
    most = int(np.max(token_ends - token_starts[edges[bin_of]], initial=1))

    own_bin, low = bin_of[run], key_at[run]
    high = low + slot_of[tokens]
    query = own_bin * most + np.arange(len(tokens)) - token_starts[edges[own_bin]]
    shape = (len(heads), most)
    keys, queries, query_of = (np.full(n, -1) for n in (len(heads) * width, len(heads) * most, len(slot_of)))
    lows, highs = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    own, nth = _each(num_keys - from_cache)
    keys[(bin_of * width + key_at + from_cache)[own] + nth] = (firsts - before + from_cache)[own] + nth
    queries[query] = tokens
    query_of[tokens] = query
    lows.reshape(-1)[query] = low
    highs.reshape(-1)[query] = high

    own, nth = _each(from_cache)
    into = (bin_of * width + key_at)[own] + nth
    cached = (row * (chunk_size + kept) + entries + column - before)[own] + nth

    def here(array: np.ndarray, *shape: int) -> Tensor:
        return torch.from_numpy(array.reshape(shape)).to(device)

    return Bins(
        keys=here(keys, len(heads), width),
        queries=here(queries, *shape),
        low=here(lows, *shape),
        high=here(highs, *shape),
        query_of=here(query_of, *slots.shape),
        into=here(into, -1),
        cached=here(cached, -1),
        reach=(highs.max(0, initial=0) + 1).tolist(),
    )


def _each(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For things in runs of these lengths: the run of each, and its number in it."""
    run = np.repeat(np.arange(len(counts)), counts)
    return run, np.arange(len(run)) - (counts.cumsum() - counts)[run]
