"""The adaptive memory chunk after chunk: matrix products of PyTorch on the piece as it lies, the rest compiled here.

A chunk's products take its tokens where they are, head by head, so that neither values nor outputs are moved. Backward
takes the chunks of a row from its end, each with the tokens that read what it left.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import memory_kernels as kernels
from .simd import LANES
from .team import run_on_team
from .tiled_attention import multiply


class Chunk(NamedTuple):
    """One that ends in the piece: its number, its row, its tokens begin..end, cached ones before them.

    `first` says that it is the first of its document.
    """

    number: int
    row: int
    begin: int
    end: int
    cached: int
    first: bool


class Plan:
    """What ends and what reads in a piece.

    Args:
        since: (B, L) int64, tokens before each in its document, -1 at padding.
        chunk_size: c.
        lag: chunk j reads what chunk j - lag left.
    """

    def __init__(self, since: Tensor, chunk_size: int, lag: int):
        places, length = since.numpy(), since.shape[1]
        slots = places % chunk_size
        ends = (slots == chunk_size - 1) & (places >= 0)
        self.chunks: list[list[Chunk]] = [[] for _ in places]
        for number, (row, token) in enumerate(np.argwhere(ends).tolist()):
            end, first = token + 1, places[row, token] == chunk_size - 1
            before = max(chunk_size - end, 0)
            self.chunks[row].append(Chunk(number, row, max(end - chunk_size, 0), end, before, bool(first)))

        reads = places >= lag * chunk_size
        entered, left = reads & (slots == 0), reads & ends
        entered[:, 0] |= reads[:, 0]
        left[:, :-1] |= reads[:, :-1] & (places[:, 1:] != places[:, :-1] + 1)
        left[:, length - 1] |= reads[:, length - 1]
        earlier = ends.cumsum(1) - ends
        self.readers: list[dict[int, tuple[int, int]]] = [{} for _ in places]
        for (row, begin), (_, last) in zip(np.argwhere(entered).tolist(), np.argwhere(left).tolist(), strict=True):
            self.readers[row][int(earlier[row, begin])] = begin, last + 1
        self.all_read = bool(reads.all())


class Kept(NamedTuple):
    """What backward needs besides what was given; N is the most chunks that may end in the piece.

    Attributes:
        reading: (B, L, H, dk) softmax of queries over features.
        weights, predicting: (N, c, H, dk) e^(k - highest) over time, and softmax over features.
        overlap: (N, H, dk, dk) weights^T predicting.
        after, rounded: (N, H, dk, dv) M after each chunk in float32, and in the type of products, empty if that is the
            same.
        scale, rho, sums: (N, H, dk) float32: of the weights, of what the chunk replaces, and sums of weights over time.
    """

    reading: Tensor
    weights: Tensor
    predicting: Tensor
    overlap: Tensor
    after: Tensor
    rounded: Tensor
    scale: Tensor
    rho: Tensor
    sums: Tensor


def make_kept(q: Tensor, memory: Tensor, chunk_size: int) -> Kept:
    """Uninitialised, for queries (B, L, H, dk) and memories (B, lag, H, dk, dv) at the entry."""
    batch, length, heads, dim = q.shape
    n, width = batch * ((chunk_size - 1 + length) // chunk_size), memory.shape[-1]
    statistics = (q.new_empty(n, heads, dim, dtype=torch.float32) for _ in range(3))
    return Kept(
        q.new_empty(q.shape),
        q.new_empty(n, chunk_size, heads, dim),
        q.new_empty(n, chunk_size, heads, dim),
        q.new_empty(n, heads, dim, dim),
        q.new_empty(n, heads, dim, width, dtype=torch.float32),
        q.new_empty(0 if q.dtype == torch.float32 else n, heads, dim, width),
        *statistics,
    )


def _tokens(piece: Tensor, cached: Tensor | None, chunk: Chunk) -> Tensor:
    """(c, H, d) of a chunk."""
    tokens = piece[chunk.row, chunk.begin : chunk.end]
    if not chunk.cached:
        return tokens
    assert cached is not None
    return torch.cat([cached[chunk.row, : chunk.cached], tokens])


def _at_exit(plan: Plan, row: int, chunks: Tensor, lag: int) -> dict[int, int]:
    """Of a row's `lag` memories at the exit, those that there are: place among all of the row, and place there."""
    ended = len(plan.chunks[row])
    return {ended + i: i for i in range(lag) if int(chunks[row]) >= lag - i}


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    values: Tensor | None,
    memory: Tensor,
    log_sum: Tensor,
    since: Tensor,
    chunks: Tensor,
    chunk_size: int,
) -> tuple[Tensor, Tensor, Tensor, Kept]:
    """Outputs, memory and log_sum at the exit, and what backward needs.

    Args:
        q, k, v: (B, L, H, d), float32 or bf16.
        keys, values: (B, c, H, d) of the unfinished chunks at the entry, or None.
        memory: (B, lag, H, dk, dv) float32.
        log_sum: (B, H, dk) float64.
        since: (B, L) int64, tokens before each in its document, -1 at padding.
        chunks: (B,) int64, absorbed at the exit.
        chunk_size: c.
    """
    lag, heads, dim, width = memory.shape[1:]
    rows, plan, kept = heads * dim, Plan(since, chunk_size, lag), make_kept(q, memory, chunk_size)
    out = v.new_empty(v.shape) if plan.all_read else v.new_zeros(v.shape)
    left, log_left = torch.zeros_like(memory), torch.zeros_like(log_sum)
    rounded = kept.after if v.dtype == torch.float32 else kept.rounded
    added, taken, highest = v.new_empty(heads, dim, width), v.new_empty(heads, dim, width), torch.empty(heads, dim)
    entry = memory.to(v.dtype)
    for row, own in enumerate(plan.chunks):
        total = log_sum[row]
        exact, products = [*memory[row]], [*entry[row]]
        for chunk in own:
            n = chunk.number
            tokens, weights, scale, rho, sums = _tokens(k, keys, chunk), *(t[n] for t in (kept.weights, *kept[6:]))
            run_on_team(kernels.weigh_on_team, rows // LANES, tokens, chunk_size, rows, weights, highest, sums)
            top = highest.double()
            own_sum = top + sums.double().log()
            total = own_sum if chunk.first else torch.logaddexp(total, own_sum)
            scale.copy_((top - total).exp())
            torch.mul(scale, sums, out=rho)
            weights = weights.permute(1, 2, 0)
            multiply(weights, _tokens(v, values, chunk).transpose(0, 1), added)
            if chunk.first:
                run_on_team(kernels.begin_on_team, rows, width, added, scale, kept.after[n], rounded[n])
            else:
                predicting = torch.softmax(tokens, -1, out=kept.predicting[n])
                multiply(weights, predicting.transpose(0, 1), kept.overlap[n])
                torch.bmm(kept.overlap[n], products[-1], out=taken)
                given = (exact[-1], added, taken, scale, rho, kept.after[n], rounded[n])
                run_on_team(kernels.step_on_team, rows, width, *given)
            exact.append(kept.after[n])
            products.append(rounded[n])
        for m, (begin, end) in plan.readers[row].items():
            reading = torch.softmax(q[row, begin:end], -1, out=kept.reading[row, begin:end])
            multiply(reading.transpose(0, 1), products[m], out[row, begin:end].transpose(0, 1))
        for m, i in _at_exit(plan, row, chunks, lag).items():
            left[row, i] = exact[m]
        if chunks[row]:
            log_left[row] = total
    return out, left, log_left, kept


class Grads(NamedTuple):
    """Gradients of what is given, in its shapes; of cached keys and values empty where there are none."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    memory: Tensor
    log_sum: Tensor


def backward(
    grad_out: Tensor | None,
    grad_left: Tensor | None,
    grad_log: Tensor | None,
    grads: Grads,
    v: Tensor,
    values: Tensor | None,
    memory: Tensor,
    since: Tensor,
    chunks: Tensor,
    chunk_size: int,
    kept: Kept,
) -> None:
    """Gradients of `forward`.

    Args:
        grad_out, grad_left, grad_log: of its outputs, None for zero.
        grads: zeros, out.
        v, values, memory, since, chunks, chunk_size, kept: as there.
    """
    lag, heads, dim, width = memory.shape[1:]
    rows, plan = heads * dim, Plan(since, chunk_size, lag)
    rounded, entry = (kept.after, memory) if v.dtype == torch.float32 else (kept.rounded, memory.to(v.dtype))
    empty, nothing = v.new_zeros(heads, dim, width), memory.new_zeros(heads, dim, width)
    of_read, taken, of_added = (torch.empty_like(empty) for _ in range(3))
    of_weights, of_predicting, unused = (kept.weights.new_zeros(chunk_size, heads, dim) for _ in range(3))
    of_overlap = kept.overlap.new_empty(heads, dim, dim)
    moved, held = (torch.empty(heads, dim) for _ in range(2))
    for row, own in enumerate(plan.chunks):
        exact = [*memory[row], *kept.after[own[0].number : own[-1].number + 1]] if own else [*memory[row]]
        products = [*entry[row], *rounded[own[0].number : own[-1].number + 1]] if own else [*entry[row]]
        at_exit: dict[int, Tensor] = {}
        if grad_left is not None:
            at_exit = {m: grad_left[row, i] for m, i in _at_exit(plan, row, chunks, lag).items()}

        def of_readers(m: int, row: int = row, products: list[Tensor] = products) -> Tensor | None:
            """Gradient of M number m through those that read it."""
            if grad_out is None or m not in plan.readers[row]:
                return None
            begin, end = plan.readers[row][m]
            grad, reading = grad_out[row, begin:end].transpose(0, 1), kept.reading[row, begin:end]
            of_reading = torch.empty_like(reading)
            multiply(grad, products[m].mT, of_reading.transpose(0, 1))
            softmax = (of_reading, reading, -1, reading.dtype)
            torch._softmax_backward_data(*softmax, grad_input=grads.q[row, begin:end])
            multiply(reading.transpose(0, 1).mT, grad, of_read)
            return of_read

        grad, through, of_total = torch.zeros_like(nothing), empty, torch.zeros(heads, dim, dtype=torch.float64)
        if grad_log is not None and chunks[row]:
            of_total = grad_log[row]
        needed = grad_log is not None
        for chunk in reversed(own):
            n, m = chunk.number, lag + chunk.number - own[0].number
            read = of_readers(m)
            if m in at_exit:
                grad += at_exit[m]
            needed = needed or read is not None or m in at_exit
            if not needed:
                continue
            weights, predicting, scale, rho, sums = (t[n] for t in (kept.weights, kept.predicting, *kept[6:]))
            before = nothing if chunk.first else exact[m - 1]
            given = (grad, empty if read is None else read, through, before, exact[m], scale, rho)
            run_on_team(kernels.step_back_on_team, rows, width, *given, of_added, moved, held)
            of_total = of_total - moved
            of_sum = rho * of_total if not chunk.first else of_total
            of_sums = (of_sum / sums - scale * held).float()
            tokens = _tokens(v, values, chunk).transpose(0, 1)
            multiply(tokens, of_added.mT, of_weights.transpose(0, 1))
            of_values = _grad_of(grads.v, chunk)
            multiply(weights.transpose(0, 1), of_added, of_values.transpose(0, 1))
            if chunk.first:
                grad, through, of_total, needed = torch.zeros_like(nothing), empty, torch.zeros_like(of_total), False
            else:
                torch.bmm(of_added, products[m - 1].mT, out=of_overlap)
                of_overlap.neg_()
                for h in range(heads):
                    of_weights[:, h].addmm_(predicting[:, h], of_overlap[h].mT)
                multiply(weights.transpose(0, 1), of_overlap, of_predicting.transpose(0, 1))
                through = torch.bmm(kept.overlap[n].mT, of_added, out=taken)
                of_total = of_total - of_sum
            of_keys = _grad_of(grads.k, chunk)
            softmax = (unused, unused) if chunk.first else (predicting, of_predicting)
            given_keys = (dim, weights, of_weights, of_sums, *softmax, of_keys)
            run_on_team(kernels.key_gradient_on_team, chunk_size * heads, *given_keys)
            if chunk.cached:
                for of_tokens, piece, cached in ((of_keys, grads.k, grads.keys), (of_values, grads.v, grads.values)):
                    cached[row, : chunk.cached], piece[row, : chunk.end] = of_tokens.split([chunk.cached, chunk.end])
        for m in range(lag):
            read = of_readers(m)
            if m == lag - 1:
                grads.memory[row, m] = grad - through
            if read is not None:
                grads.memory[row, m] += read
            if m in at_exit:
                grads.memory[row, m] += at_exit[m]
        grads.log_sum[row] = of_total


def _grad_of(grads: Tensor, chunk: Chunk) -> Tensor:
    """(c, H, d) where the gradients of a chunk's tokens go: to their place, if all are in the piece."""
    if chunk.cached:
        return grads.new_empty(chunk.cached + chunk.end, *grads.shape[2:])
    return grads[chunk.row, chunk.begin : chunk.end]
