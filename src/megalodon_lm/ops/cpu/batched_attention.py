"""Causal attention of many short groups at once: one matrix product of PyTorch for all that have one shape.

By itself the product of a short group takes several times as long to start as to do. So queries, keys and values are
brought together, group by group and head by head, and results back.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from . import attention_kernels as kernels
from .attention_operands import Operands
from .simd import as_numpy
from .team import num_threads

SHORT = 1 << 16  # weights of a head that a short group has at most
TOGETHER = 1 << 20  # weights that are held


def short(groups: np.ndarray, tile: int) -> np.ndarray:
    """Which of (M, 5) are: few weights, and no more queries than a tile, of which longer ones leave some out."""
    queries = groups[:, 2] - groups[:, 1]
    return (queries <= tile) & (queries * (queries + groups[:, 3]) <= SHORT)


def _alike(groups: np.ndarray, heads: int) -> Iterator[np.ndarray]:
    """Those together that have as many queries, keys and keys of a cache as each other; none that see the same keys."""
    shapes, of_row = defaultdict(list), Counter[int]()
    for group in groups.tolist():
        row, begin, end, before, _ = group
        of_row[row] += 1
        shapes[end - begin, before, max(before - begin, 0), of_row[row] if before else 0].append(group)
    for (n, before, *_), alike in shapes.items():
        most = max(1, TOGETHER // (heads * n * (n + before)))
        for i in range(0, len(alike), most):
            yield np.array(alike[i : i + most])


def _packed(piece: Tensor, cached: Tensor, groups: np.ndarray) -> Tensor:
    """(G * H, keys before and tokens of a group, d)."""
    _, begin, end, before, _ = groups[0].tolist()
    packed = piece.new_empty(len(groups) * piece.shape[2], end - begin + before, piece.shape[3])
    kernels.pack(num_threads(), as_numpy(cached), as_numpy(piece), groups, as_numpy(packed))
    return packed


def _together(given: Operands, groups: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """The groups as if they saw themselves alone, and queries, keys and values."""
    q, k, v, keys, values = given
    own = groups * (1, 1, 1, 0, 1)
    return own, _packed(q, q, own), _packed(k, keys, groups), _packed(v, values, groups)


def forward(given: Operands, slots: Tensor, groups: np.ndarray, out: Tensor, sums: Tensor) -> None:
    """As tiled_attention.forward."""
    threads, slots_of, sums_of, target = num_threads(), as_numpy(slots), as_numpy(sums), as_numpy(out)
    for alike in _alike(groups, given.q.shape[2]):
        own, qs, ks, vs = _together(given, alike)
        scores = torch.bmm(qs, ks.mT)
        kernels.softmax(threads, as_numpy(scores), slots_of, alike, 0, sums_of)
        kernels.unpack(threads, as_numpy(torch.bmm(scores, vs)), own, False, target, target)


def backward(
    grad: Tensor,
    given: Operands,
    ends: np.ndarray,
    groups: np.ndarray,
    out: Tensor,
    sums: Tensor,
    grads: Operands,
) -> None:
    """As tiled_attention.backward."""
    threads = num_threads()
    output, incoming, sums_of, to = as_numpy(out), as_numpy(grad), as_numpy(sums), grads.arrays()
    for alike in _alike(groups, given.q.shape[2]):
        own, qs, ks, vs = _together(given, alike)
        gs, deltas = vs.new_empty(*qs.shape[:2], vs.shape[2]), np.empty(qs.shape[:2], np.float32)
        kernels.pack_gradient(threads, incoming, output, alike, as_numpy(gs), deltas)
        weights, scores = torch.bmm(ks, qs.mT), torch.bmm(vs, gs.mT)
        tile = (as_numpy(weights), as_numpy(scores), ends, given.q.shape[1], alike, 0, 0, sums_of, deltas)
        if scores.dtype == torch.bfloat16:
            kernels.weighted_sums(threads, *tile)
        kernels.weight_gradients(threads, *tile)
        skipped = max(int(alike[0, 3] - alike[0, 1]), 0) if grads.of_piece_alone else 0
        asked = alike - np.array((0, 0, 0, skipped, 0))
        kernels.unpack(threads, as_numpy(torch.bmm(weights[:, skipped:], gs)), asked, True, to.values, to.v)
        kernels.unpack(threads, as_numpy(torch.bmm(scores[:, skipped:], qs)), asked, True, to.keys, to.k)
        kernels.unpack(threads, as_numpy(torch.bmm(scores.mT, ks)), own, False, to.q, to.q)
