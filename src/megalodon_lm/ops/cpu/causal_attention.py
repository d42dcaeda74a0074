"""Causal attention inside the chunks of a piece, as an operator: matrix products of PyTorch, the rest compiled here.

Queries of a group (one chunk, or several short ones) are taken in tiles against the keys up to the tile; backward takes
tiles of keys against the queries from there on and computes the weights anew. So nothing above the diagonal tile is
computed, and nothing larger than a tile by a chunk is held.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import attention_kernels as kernels
from .scalars import array_of
from .team import num_threads

TILE_SIZE = 256
FEW_QUERIES = 8

Group = tuple[int, int, int, int]  # row, first and last token, cached keys before them


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor
) -> Tensor:
    """Softmax attention with scale 1 of each token to its chunk up to itself.

    Args:
        q, k: (B, L, H, dk), rotated, float32 or bf16.
        v: (B, L, H, dv).
        keys, values: (B, c, H, d) the unfinished chunks at the entry, or None for empty ones.
        slots: (B, L) int64, place of each token in its chunk, -1 at padding; see attention_kernels.

    Returns:
        (B, L, H, dv), zero at padding.
    """
    given = (q, k, v) if keys is None or values is None else (q, k, v, keys, values)
    tracked = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    run = attention_forward if tracked or torch.compiler.is_compiling() else _forward
    return run(q, k, v, keys, values, slots)[0]


def _plan(slots: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Ends (B, L) and groups (M, 4)."""
    ends = np.empty(slots.shape, np.int64)
    groups = np.empty((slots.numel(), 4), np.int64)
    count = kernels.plan_groups(array_of(slots), TILE_SIZE, ends, groups)
    return ends, groups[:count]


def _by_heads(piece: Tensor, cached: Tensor | None, group: Group) -> Tensor:
    """(H, cached keys and tokens of the group, d); a view if nothing is cached, matrix products take its strides."""
    row, begin, end, before = group
    tokens = piece[row, begin:end].transpose(0, 1)
    if not before:
        return tokens
    assert cached is not None
    return torch.cat([cached[row, :before].transpose(0, 1), tokens], 1)


def _forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Output, and logarithms of the softmax's sums: (H, n) for each group in turn, flat."""
    _, groups = _plan(slots)
    heads = q.shape[2]
    num_queries = groups[:, 2] - groups[:, 1]
    everywhere = num_queries.sum() == slots.numel()
    fresh = v.new_empty if everywhere else v.new_zeros
    out, sums = fresh(v.shape), fresh(slots.numel() * heads, dtype=torch.float32)
    few = num_queries <= FEW_QUERIES
    if few.any():
        some = groups[few]
        shape = (len(some), heads, int(num_queries[few].max()), int((num_queries + groups[:, 3])[few].max()))
        cache = [array_of(piece if cached is None else cached) for piece, cached in ((k, keys), (v, values))]
        piece = [array_of(t) for t in (q, k, v)]
        places = (array_of(slots), some, np.empty(shape, np.float32))
        kernels.attend_few(num_threads(), *piece, *cache, *places, array_of(out), array_of(sums))
        groups = groups[~few]
    if len(groups) == 0:
        return out, sums

    threads, slots_of, sums_of = num_threads(), array_of(slots), array_of(sums)
    scratch = q.new_empty(int((groups[:, 2] - groups[:, 1] + groups[:, 3]).max()) * heads * TILE_SIZE)
    for group in map(tuple, groups.tolist()):
        row, begin, end, before = group
        qs, ks, vs = _by_heads(q, None, (row, begin, end, 0)), _by_heads(k, keys, group), _by_heads(v, values, group)
        logs = sums_of[heads * (row * q.shape[1] + begin) :][: heads * (end - begin)].reshape(heads, end - begin)
        for start in range(0, end - begin, TILE_SIZE):
            stop = min(start + TILE_SIZE, end - begin)
            high = before + stop
            scores = scratch[: heads * (stop - start) * high].view(heads, stop - start, high)
            for h in range(heads):
                torch.mm(qs[h, start:stop], ks[h, :high].T, out=scores[h])
            kernels.softmax(threads, array_of(scores), slots_of[row, begin:end], before, start, logs)
            for h in range(heads):
                torch.mm(scores[h], vs[h, :high], out=out[row, begin + start : begin + stop, h])
    return out, sums


@torch.library.custom_op("megalodon::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """_forward as an operator."""
    return _forward(q, k, v, keys, values, slots)


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None, slots: Tensor) -> Any:
    return v.new_empty(v.shape), v.new_empty(q.shape[0] * q.shape[1] * q.shape[2], dtype=torch.float32)


@torch.library.custom_op("megalodon::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor,
    out: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients to q, k, v, keys and values; the last two empty if there is no cache."""
    ends, groups = _plan(slots)
    heads, threads = q.shape[2], num_threads()
    everywhere = (groups[:, 2] - groups[:, 1]).sum() == slots.numel()
    grad_q, grad_k, grad_v = (t.new_empty(t.shape) if everywhere else t.new_zeros(t.shape) for t in (q, k, v))
    grad_keys, grad_values = (q.new_zeros(0) if t is None else t.new_zeros(t.shape) for t in (keys, values))
    longest = int((groups[:, 2] - groups[:, 1]).max(initial=0))
    scratch = q.new_empty(2, longest * heads * TILE_SIZE)
    output, incoming, sums_of = array_of(out), array_of(grad), array_of(sums)
    for group in map(tuple, groups.tolist()):
        row, begin, end, before = group
        n = end - begin
        qs, ks, vs = _by_heads(q, None, (row, begin, end, 0)), _by_heads(k, keys, group), _by_heads(v, values, group)
        gs, deltas = v.new_empty(heads, n, v.shape[-1]), np.empty((heads, n), np.float32)
        kernels.pack_gradient(threads, incoming, output, row, begin, array_of(gs), deltas)
        logs = sums_of[heads * (row * q.shape[1] + begin) :][: heads * n].reshape(heads, n)
        last = ends[row, begin:end] - begin
        dq = qs.new_zeros(qs.shape, dtype=torch.float32)
        if before:
            dk, dv = torch.empty_like(ks), torch.empty_like(vs)
        else:
            dk, dv = (t[row, begin:end].transpose(0, 1) for t in (grad_k, grad_v))
        for start in range(0, before + n, TILE_SIZE):
            stop = min(start + TILE_SIZE, before + n)
            query = max(start - before, 0)
            shape = (heads, stop - start, n - query)
            weights, scores = (t[: shape[0] * shape[1] * shape[2]].view(shape) for t in scratch)
            for h in range(heads):
                torch.mm(ks[h, start:stop], qs[h, query:].T, out=weights[h])
                torch.mm(vs[h, start:stop], gs[h, query:].T, out=scores[h])
            tile = (array_of(weights), array_of(scores), last, before, start, query, logs, deltas)
            kernels.weight_gradients(threads, *tile)
            for h in range(heads):
                torch.mm(weights[h], gs[h, query:], out=dv[h, start:stop])
                torch.mm(scores[h], qs[h, query:], out=dk[h, start:stop])
                dq[h, query:] += scores[h].T @ ks[h, start:stop]
        grad_q[row, begin:end] = dq.transpose(0, 1)
        if before:
            grad_k[row, begin:end] = dk[:, before:].transpose(0, 1)
            grad_v[row, begin:end] = dv[:, before:].transpose(0, 1)
            grad_keys[row, :before] = dk[:, :before].transpose(0, 1)
            grad_values[row, :before] = dv[:, :before].transpose(0, 1)
    return grad_q, grad_k, grad_v, grad_keys, grad_values


@attention_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    slots: Tensor,
    out: Tensor,
    sums: Tensor,
) -> Any:
    cached = (q.new_empty(0) if t is None else t.new_empty(t.shape) for t in (keys, values))
    return *(t.new_empty(t.shape) for t in (q, k, v)), *cached


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Tensor) -> Any:
    saved = ctx.saved_tensors  # asked for once: checkpointing allows no second time
    *grads, grad_keys, grad_values = attention_backward(grad, *saved)
    cached = saved[3] is not None
    return *grads, grad_keys if cached else None, grad_values if cached else None, None


attention_forward.register_autograd(_backward, setup_context=_save)
