"""Causal attention of groups by the processor's own products; the same two functions as tiled_attention.

A group is computed in one compiled call, in squares of 32 by 32: scores go from sums through the softmax and back
into them without leaving the cache. Forward holds 32 queries by a chunk for each thread, backward two tiles of 256
keys by the queries of a chunk.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import squares
from .attention_operands import Group, Operands
from .simd import as_numpy
from .squares import SQUARE
from .squares_backward import KEY_STRIPS, Exchange, Queries, attend_backward
from .squares_forward import Packed, attend
from .squares_packing import Result, empty_words
from .team import num_threads


def fits(q: Tensor, v: Tensor) -> bool:
    """Whether these go into squares: those of bf16, and those of float32 that fill them."""
    if q.dtype != v.dtype or squares.available(q.dtype) is None:
        return False
    return q.dtype == torch.bfloat16 or not any(t.shape[3] % SQUARE for t in (q, v))


def _widened(given: Operands) -> Operands:
    """With heads as wide as whole squares, zeros after what is there; the same tensor stays one."""
    wide = {id(t): _wide(t) for t in given}
    return Operands(*(wide[id(t)] for t in given))


def _wide(t: Tensor) -> Tensor:
    return F.pad(t, (0, -t.shape[3] % SQUARE)) if t.shape[3] % SQUARE else t


def _narrow(wide: Tensor, t: Tensor) -> None:
    """Bring what was made in a widened tensor back."""
    if wide is not t:
        t.copy_(wide[..., : t.shape[3]])


def _strips(lengths: np.ndarray) -> int:
    """Strips of the longest."""
    return -(-int(lengths.max()) // SQUARE)


def _sums_of(group: Group, length: int, heads: int, sums: np.ndarray) -> np.ndarray:
    """The part (H, n) of a group in the flat sums of all."""
    n = group.end - group.begin
    return sums[heads * (group.row * length + group.begin) :][: heads * n].reshape(heads, n)


def _ends_in_group(ends: np.ndarray, length: int, group: Group) -> np.ndarray:
    """(before + n,) the query of a group after the last one that sees each of its keys, out of (B, entries + L)."""
    at = ends.shape[1] - length + group.begin
    return np.minimum(ends[group.row, at - group.before : at + group.end - group.begin], group.end) - group.begin


def forward(given: Operands, slots: Tensor, groups: np.ndarray, out: Tensor, sums: Tensor) -> None:
    """As tiled_attention.forward."""
    given = _widened(given)
    length, heads = given.q.shape[1:3]
    arrays = given.arrays()
    wide = _wide(out)
    slots_of, sums_of, target = as_numpy(slots), as_numpy(sums), as_numpy(wide)
    longest = _strips(groups[:, 2] - groups[:, 1] + groups[:, 3])
    packed = Packed(*(empty_words(heads * longest * SQUARE * t.shape[3] * t.itemsize // 4) for t in given[1:3]))
    for group in (Group(*row) for row in groups.tolist()):
        result = Result(target, _sums_of(group, length, heads, sums_of))
        attend(
            num_threads(),
            squares.available(given.q.dtype),
            arrays,
            group,
            slots_of[group.row, group.begin : group.end],
            packed,
            result,
        )
    _narrow(wide, out)


def backward(
    grad: Tensor,
    given: Operands,
    ends: np.ndarray,
    groups: np.ndarray,
    out: Tensor,
    sums: Tensor,
    grads: Operands,
) -> None:
    """As tiled_attention.backward; those to the cache are computed whether asked for or not."""
    if grads.of_piece_alone and not given.of_piece_alone:
        unasked = (torch.zeros_like(t) for t in (given.keys, given.values))
        grads = Operands(*grads[:3], *unasked)
    given, wide = _widened(given), _widened(grads)
    (length, heads, dk), dv = given.q.shape[1:], given.v.shape[3]
    arrays, written = given.arrays(), wide.arrays()
    incoming, output, sums_of = as_numpy(_wide(grad)), as_numpy(_wide(out)), as_numpy(sums)
    strips = heads * _strips(groups[:, 2] - groups[:, 1])  # of queries
    kind, tiles = arrays.q.dtype, squares.available(given.q.dtype)
    per_word = 4 // kind.itemsize
    packed = (empty_words(strips * SQUARE * d // per_word) for d in (dk, dv, dk, dv))
    queries = Queries(*packed, *(empty_words(strips * SQUARE).view(np.float32) for _ in range(2)))
    turned = empty_words(heads * dk * KEY_STRIPS * SQUARE // per_word).view(kind)
    scores = empty_words(strips * KEY_STRIPS * SQUARE * SQUARE // per_word)
    for group in (Group(*row) for row in groups.tolist()):
        n = group.end - group.begin
        exchange = Exchange(turned, scores, torch.zeros(heads * -(-n // SQUARE) * SQUARE * dk).numpy())
        result = Result(output, _sums_of(group, length, heads, sums_of))
        last = _ends_in_group(ends, length, group)
        attend_backward(num_threads(), tiles, incoming, arrays, group, last, result, queries, exchange, written)
    for made, t in zip(wide, grads, strict=True):
        _narrow(made, t)
