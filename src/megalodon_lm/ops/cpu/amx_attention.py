"""Causal attention of groups by the processor's own matrix tiles; the same two functions as tiled_attention.

A group is computed in one compiled call, in blocks of 32 by 32: scores go from the tiles through the softmax and back
into the tiles without leaving the cache. Forward holds 32 queries by a chunk for each thread, backward two tiles of 256
keys by the queries of a chunk.
"""

import numpy as np
import torch
from torch import Tensor

from . import amx_attention_kernels as kernels
from .amx import BLOCK, BLOCK_WORDS
from .processor import multiplies_tiles
from .scalars import array_of
from .team import num_threads

_KEY_BLOCKS = 8  # of a tile of keys in backward


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether these go into tiles: bf16, and widths of heads a multiple of 32."""
    return q.dtype == torch.bfloat16 and q.shape[3] % BLOCK == 0 and v.shape[3] % BLOCK == 0 and multiplies_tiles()


def _words(count: int) -> np.ndarray:
    """32-bit words from the start of a cache line."""
    return torch.empty(count, dtype=torch.int32).numpy().view(np.uint32)


def _blocks(length: int) -> int:
    return -(-length // BLOCK)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor,
    groups: np.ndarray,
    out: Tensor,
    sums: Tensor,
) -> None:
    """As tiled_attention.forward."""
    length, heads = q.shape[1:3]
    piece = [array_of(t) for t in (q, k, v)]
    cache = [array_of(given if cached is None else cached) for given, cached in ((k, keys), (v, values))]
    slots_of, sums_of, target = array_of(slots), array_of(sums), array_of(out)
    longest = _blocks(int((groups[:, 2] - groups[:, 1] + groups[:, 3]).max()))
    packed = [_words(heads * longest * BLOCK * t.shape[3] // 2) for t in (k, v)]
    for row, begin, end, before in groups.tolist():
        logs = sums_of[heads * (row * length + begin) :][: heads * (end - begin)].reshape(heads, end - begin)
        group = (row, begin, end, before)
        kernels.attend(
            num_threads(), *piece, *cache, group, *packed, slots_of[row, begin:end], target, logs
        )  # fmt: skip


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    ends: np.ndarray,
    groups: np.ndarray,
    out: Tensor,
    sums: Tensor,
    grad_q: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_keys: Tensor,
    grad_values: Tensor,
) -> None:
    """As tiled_attention.backward."""
    length, heads, dk, dv = *q.shape[1:], v.shape[3]
    piece = tuple(array_of(t) for t in (q, k, v))
    grads = tuple(array_of(t) for t in (grad_q, grad_k, grad_v))
    cache, grad_cache = piece[1:], grads[1:]
    if keys is not None and values is not None:
        cache = (array_of(keys), array_of(values))
        grad_cache = (array_of(grad_keys), array_of(grad_values))
    incoming, output, sums_of = array_of(grad), array_of(out), array_of(sums)
    longest = _blocks(int((groups[:, 2] - groups[:, 1]).max()))
    packed = tuple(_words(heads * longest * BLOCK * d // 2) for d in (dk, dv, dk, dv))
    rows = tuple(_words(heads * longest * BLOCK).view(np.float32) for _ in range(2))
    turned = _words(heads * dk * _KEY_BLOCKS * BLOCK // 2).view(np.uint16)
    packed_scores = _words(heads * longest * _KEY_BLOCKS * BLOCK_WORDS)
    for row, begin, end, before in groups.tolist():
        logs = sums_of[heads * (row * length + begin) :][: heads * (end - begin)].reshape(heads, end - begin)
        sums_q = torch.zeros(heads * _blocks(end - begin) * BLOCK * dk).numpy()
        last = ends[row, begin:end] - begin
        kernels.attend_backward(
            num_threads(), incoming, output, piece, cache, (row, begin, end, before), last, logs, packed, rows,
            _KEY_BLOCKS, turned, packed_scores, sums_q, grads, grad_cache,
        )  # fmt: skip
