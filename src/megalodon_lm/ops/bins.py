"""Chunks of packed and ragged rows laid side by side in bins, so that attention costs what the documents cost.

A chunk, or what of it lies in the piece and in the entry cache, stays together and sees itself alone. Chunks go into
bins in order, as many into each as fit: a bin is as wide as the longest chunk, or a little wider than short ones.
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
    cached: Tensor  # (R,) row of the cache b * c + slot that goes there
    reach: list[int]  # (Q,) for each query, the key after the last one that it sees in any bin

    def gather_keys(self, piece: Tensor, cache: Tensor | None) -> Tensor:
        """Keys or values (B, L, ...) and those of the entry cache (B, c, ...) to (M, K, ...), zero where none is."""
        keys = take(piece.flatten(0, 1), self.keys)
        if cache is None or not len(self.into):
            return keys
        rows = cache.flatten(0, 1)[self.cached].to(keys.dtype)
        return keys.flatten(0, 1).index_copy(0, self.into, rows).view_as(keys)


def pack_into_bins(slots: Tensor, chunk_size: int, device: torch.device) -> Bins:
    """Lay the chunks of a piece into bins.

    Args:
        slots: (B, L) int64 on the CPU, place of each token in its chunk, cached ones counted; -1 at padding.
        chunk_size: c.
        device: where the result lives.
    """
    length = slots.shape[1]
    slot_of = slots.numpy()
    begins = slot_of == 0
    begins[:, :1] |= slot_of[:, :1] >= 0
    tokens = np.flatnonzero(slot_of >= 0)
    firsts = np.flatnonzero(begins)  # token that begins each run of a chunk
    run = begins.reshape(-1)[tokens].cumsum() - 1  # of each token
    slot_of = slot_of.reshape(-1)
    before = slot_of[firsts]  # cached keys of each run
    num_tokens = np.bincount(run, minlength=len(firsts))
    num_keys = before + num_tokens
    key_ends = num_keys.cumsum()
    key_starts = key_ends - num_keys

    capacity = max(int(num_keys.max(initial=1)), min(chunk_size, MERGED_KEYS))
    following = np.searchsorted(key_ends, key_starts + capacity, side="right")
    heads = [0]  # first run of each bin; one bin even for nothing
    while heads[-1] < len(firsts) and following[heads[-1]] < len(firsts):
        heads.append(int(following[heads[-1]]))
    edges = np.array([*heads, len(firsts)])
    bin_of = np.repeat(np.arange(len(heads)), np.diff(edges))  # of each run
    key_at = key_starts - key_starts[edges[bin_of]]  # first key of each run in its bin
    token_ends = num_tokens.cumsum()
    token_starts = token_ends - num_tokens
    width = int(np.max(key_at + num_keys, initial=1))
    most = int(np.max(token_ends - token_starts[edges[bin_of]], initial=1))

    own_bin, low = bin_of[run], key_at[run]
    high = low + slot_of[tokens]
    query = own_bin * most + np.arange(len(tokens)) - token_starts[edges[own_bin]]
    shape = (len(heads), most)
    keys, queries, query_of = (np.full(n, -1) for n in (len(heads) * width, len(heads) * most, len(slot_of)))
    lows, highs = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    keys[own_bin * width + high] = tokens
    queries[query] = tokens
    query_of[tokens] = query
    lows.reshape(-1)[query] = low
    highs.reshape(-1)[query] = high

    nth = np.arange(before.sum()) - np.repeat(before.cumsum() - before, before)
    into = np.repeat(bin_of * width + key_at, before) + nth
    cached = np.repeat(firsts // max(length, 1) * chunk_size, before) + nth

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
