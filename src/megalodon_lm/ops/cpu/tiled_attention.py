"""Causal attention of groups by matrix products of PyTorch, the rest compiled here.

Queries of a group are taken in tiles against the keys up to the tile; backward takes tiles of keys against the queries
from there on and computes the weights anew. So nothing above the diagonal tile is computed, and nothing larger than a
tile by a chunk is held.
"""

import numpy as np
import torch
from torch import Tensor

from . import attention_kernels as kernels
from .attention_operands import Group, Operands
from .simd import as_numpy
from .team import num_threads

TILE_SIZE = 256  # of bf16; half as many of float32, whose scores would not fit into the second cache


def tile_size(t: Tensor) -> int:
    """Queries of a tile."""
    return max(1, TILE_SIZE * torch.bfloat16.itemsize // t.itemsize)


def _by_heads(piece: Tensor, cached: Tensor, group: Group) -> Tensor:
    """(H, keys before and tokens of the group, d); a view if none is cached, matrix products take its strides."""
    row, begin, end, before, entries = group
    low = begin - before
    tokens = piece[row, max(low, 0) : end].transpose(0, 1)
    if low >= 0:
        return tokens
    return torch.cat([cached[row, entries + low : entries].transpose(0, 1), tokens], 1)


def multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    """out = a @ b for each head. In one call PyTorch is faster in float32, and slower in bf16, where it copies."""
    if a.dtype == torch.float32:
        torch.bmm(a, b, out=out)
        return
    for h in range(len(a)):
        torch.mm(a[h], b[h], out=out[h])


def _return(grad: Tensor, piece: Tensor, cached: Tensor | None, group: Group) -> None:
    """Gradients of `_by_heads`: written to the tokens of the group, added to those before, which have one already."""
    row, begin, end, before, entries = group
    grad, low = grad.transpose(0, 1), begin - before
    piece[row, begin:end] = grad[before:]
    piece[row, max(low, 0) : begin] += grad[max(-low, 0) : before]
    if low < 0 and cached is not None:
        cached[row, entries + low : entries] += grad[:-low]


def forward(given: Operands, slots: Tensor, groups: np.ndarray, out: Tensor, sums: Tensor) -> None:
    """Attention of groups of queries.

    Args:
        given: float32 or bf16, all of one type.
        slots: (B, L), how many tokens before it a token sees.
        groups: (M, 5), M not 0: of `Group`.
        out: (B, L, H, dv), out.
        sums: (B * L * H,), out: logarithms of the softmax's sums, (H, n) for each group in turn.
    """
    q, k, v, keys, values = given
    heads = q.shape[2]
    threads, slots_of, sums_of = num_threads(), as_numpy(slots), as_numpy(sums)
    size = tile_size(q)
    scratch = q.new_empty(int((groups[:, 2] - groups[:, 1] + groups[:, 3]).max()) * heads * size)
    for alone in np.split(groups, len(groups)):
        group = row, begin, end, before, _ = Group(*alone[0].tolist())
        qs, ks, vs = q[row, begin:end].transpose(0, 1), _by_heads(k, keys, group), _by_heads(v, values, group)
        for start in range(0, end - begin, size):
            stop = min(start + size, end - begin)
            high = before + stop
            scores = scratch[: heads * (stop - start) * high].view(heads, stop - start, high)
            multiply(qs[:, start:stop], ks[:, :high].mT, scores)
            kernels.softmax(threads, as_numpy(scores), slots_of, alone, start, sums_of)
            multiply(scores, vs[:, :high], out[row, begin + start : begin + stop].transpose(0, 1))


def backward(
    grad: Tensor,
    given: Operands,
    ends: np.ndarray,
    groups: np.ndarray,
    out: Tensor,
    sums: Tensor,
    grads: Operands,
) -> None:
    """Gradients of `forward`, which those of the cache are added to.

    Args:
        grad: (B, L, H, dv) of the output.
        given, groups, out, sums: as there.
        ends: (B, entries + L), the token after the last one that sees an entry of the cache or a token.
        grads: of what is given, out: zero at what no token of these groups sees or is; of the piece alone, if those to
            the cache are not asked for.
    """
    q, k, v, keys, values = given
    heads, threads = q.shape[2], num_threads()
    longest = int((groups[:, 2] - groups[:, 1]).max(initial=0))
    size = tile_size(q)
    scratch = q.new_empty(2, longest * heads * size)
    output, incoming, sums_of = as_numpy(out), as_numpy(grad), as_numpy(sums)
    for alone in np.split(groups, len(groups)):
        group = row, begin, end, before, _ = Group(*alone[0].tolist())
        n = end - begin
        qs, ks, vs = q[row, begin:end].transpose(0, 1), _by_heads(k, keys, group), _by_heads(v, values, group)
        gs, deltas = v.new_empty(heads, n, v.shape[-1]), np.empty((heads, n), np.float32)
        kernels.pack_gradient(threads, incoming, output, alone, as_numpy(gs), deltas)
        dq = qs.new_zeros(qs.shape, dtype=torch.float32)
        if before:
            dk, dv = torch.empty_like(ks), torch.empty_like(vs)
        else:
            dk, dv = (t[row, begin:end].transpose(0, 1) for t in grads[1:3])
        first = max(before - begin, 0) if grads.of_piece_alone else 0  # key whose gradients are asked for
        for start in range(0, before + n, size):
            stop = min(start + size, before + n)
            query = max(start - before, 0)
            shape = (heads, stop - start, n - query)
            weights, scores = (t[: shape[0] * shape[1] * shape[2]].view(shape) for t in scratch)
            multiply(ks[:, start:stop], qs[:, query:].mT, weights)
            multiply(vs[:, start:stop], gs[:, query:].mT, scores)
            tile = (as_numpy(weights), as_numpy(scores), ends, q.shape[1], alone, start, query, sums_of, deltas)
            if q.dtype == torch.bfloat16:
                kernels.weighted_sums(threads, *tile)
            kernels.weight_gradients(threads, *tile)
            asked = max(first, start)
            if asked < stop:
                multiply(weights[:, asked - start :], gs[:, query:], dv[:, asked:stop])
                multiply(scores[:, asked - start :], qs[:, query:], dk[:, asked:stop])
            for h in range(heads):
                dq[h, query:] += scores[h].T @ ks[h, start:stop]
        grads.q[row, begin:end] = dq.transpose(0, 1)
        if before:
            _return(dk, grads.k, None if grads.of_piece_alone else grads.keys, group)
            _return(dv, grads.v, None if grads.of_piece_alone else grads.values, group)
