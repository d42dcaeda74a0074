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
from .simd import as_numpy
from .team import num_threads

SHORT = 1 << 16  # weights of a head that a short group has at most
TOGETHER = 1 << 20  # weights that are held


def short(groups: np.ndarray, tile: int) -> np.ndarray:
    """Which of (M, 5) are: few weights, and no more queries than a tile, of which longer ones leave some out."""
    queries = groups[:, 2] - groups[:, 1]
    return (queries <= tile) & (queries * (queries + groups[:, 3]) <= SHORT)


def _alike(groups: np.ndarray, heads: int) -> Iterator[np.ndarray]:
    """Those together that have as many queries and keys as each other, but none that see the same keys."""
    shapes, of_row = defaultdict(list), Counter[int]()
    for group in groups.tolist():
        row, begin, end, before, _ = group
        of_row[row] += 1
        shapes[end - begin, before, of_row[row] if before else 0].append(group)
    for (n, before, _), alike in shapes.items():
        most = max(1, TOGETHER // (heads * n * (n + before)))
        for i in range(0, len(alike), most):
            yield np.array(alike[i : i + most])


def _packed(piece: Tensor, cached: Tensor | None, groups: np.ndarray) -> Tensor:
    """(G * H, keys before and tokens of a group, d)."""
    _, begin, end, before, _ = groups[0].tolist()
    packed = piece.new_empty(len(groups) * piece.shape[2], end - begin + before, piece.shape[3])
    first = piece if cached is None else cached
    kernels.pack(num_threads(), as_numpy(first), as_numpy(piece), groups, as_numpy(packed))
    return packed


def _operands(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, groups: np.ndarray
) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """The groups as if they saw themselves alone, and queries, keys and values."""
    own = groups * (1, 1, 1, 0, 1)
    return own, _packed(q, None, own), _packed(k, keys, groups), _packed(v, values, groups)


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
    threads, slots_of, sums_of, target = num_threads(), as_numpy(slots), as_numpy(sums), as_numpy(out)
    for alike in _alike(groups, q.shape[2]):
        own, qs, ks, vs = _operands(q, k, v, keys, values, alike)
        scores = torch.bmm(qs, ks.mT)
        kernels.softmax(threads, as_numpy(scores), slots_of, alike, 0, sums_of)
        kernels.unpack(threads, as_numpy(torch.bmm(scores, vs)), own, False, target, target)


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
    threads = num_threads()
    output, incoming, sums_of, to_q, to_k, to_v = map(as_numpy, (out, grad, sums, grad_q, grad_k, grad_v))
    to_keys, to_values = (to_k, to_v) if keys is None else (as_numpy(grad_keys), as_numpy(grad_values))
    for alike in _alike(groups, q.shape[2]):
        own, qs, ks, vs = _operands(q, k, v, keys, values, alike)
        gs, deltas = v.new_empty(*qs.shape[:2], v.shape[3]), np.empty(qs.shape[:2], np.float32)
        kernels.pack_gradient(threads, incoming, output, alike, as_numpy(gs), deltas)
        weights, scores = torch.bmm(ks, qs.mT), torch.bmm(vs, gs.mT)
        tile = (as_numpy(weights), as_numpy(scores), ends, q.shape[1], alike, 0, 0, sums_of, deltas)
        kernels.weight_gradients(threads, *tile)
        kernels.unpack(threads, as_numpy(torch.bmm(weights, gs)), alike, True, to_values, to_v)
        kernels.unpack(threads, as_numpy(torch.bmm(scores, qs)), alike, True, to_keys, to_k)
        kernels.unpack(threads, as_numpy(torch.bmm(scores.mT, ks)), own, False, to_q, to_q)
