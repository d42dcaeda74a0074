"""The generalised delta rule with a decay for every channel: the recurrence of RWKV-7.

A head's matrix is multiplied, token by token, by a diagonal matrix plus one of rank 1, and takes one in of rank 1. In a
chunk of T tokens all of that folds into matrix products (the WY form of products of such matrices), and from chunk to
chunk goes S' = P S + Q alone. Source: Peng et al. 2025 (arXiv 2503.14456); Yang et al. 2024 (arXiv 2406.06484) for the
chunks.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, Strips, cut_into_strips
from .finite import is_finite

CHUNK_SIZE = 16  # decays over a chunk are divided by each other: with w >= 0.545, by no less than 6e-5


@op()
def generalized_delta_rule(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(w_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t; y_t = r_t S_t, for each head.

    Args:
        r, k, a, b: (B, L, H, K), L at least 1.
        log_w: (B, L, H, K), logarithm of the decay, at least -0.61 or so: see CHUNK_SIZE.
        v: (B, L, H, V).
        state: (B, H, K, V) S at the entry, or None for zero.
        boundaries: documents restart from zero; padding yields 0 and leaves S alone.

    Returns:
        y (B, L, H, V) in the type of r, and S at the exit (B, H, K, V) in float32 or better.
    """
    inputs = r, log_w, k, v, a, b, state, boundaries
    if k.shape[1] == 1:
        return _token_by_token(*inputs)
    y, leaving = _in_chunks(*inputs)
    since = (boundaries or Boundaries()).since_start(torch.zeros(len(k), dtype=torch.int64), k.shape[1])
    if boundaries is not None and boundaries.lengths is not None:
        since = torch.where(boundaries.valid(k.shape[1]), since, -1)
    finite = is_finite(y, since) and bool(torch.isfinite(leaving.sum()))
    return (y, leaving) if finite else _token_by_token(*inputs)


def _token_by_token(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    boundaries: Boundaries | None,
) -> tuple[Tensor, Tensor]:
    """The recurrence itself: for one token, and where a number that is not finite would spread within its chunk."""
    batch, length, heads, width = k.shape
    wide = torch.promote_types(r.dtype, torch.float32)
    matrix = k.new_zeros(batch, heads, width, v.shape[-1], dtype=wide) if state is None else state.to(wide)
    begins = None if boundaries is None or boundaries.starts is None else boundaries.starts.to(k.device)
    valid = None if boundaries is None or boundaries.lengths is None else boundaries.valid(length).to(k.device)
    out = []
    tokens = (t.to(wide)[..., None].unbind(1) for t in (r, log_w.exp(), k, v, a, b))
    for t, (asking, decay, key, value, asked, taken) in enumerate(zip(*tokens, strict=True)):
        before = matrix if begins is None else torch.where(begins[:, t, None, None, None], 0, matrix)
        found = asked.mT @ before
        after = decay * before + taken * found + key * value.mT
        y = (asking.mT @ after)[:, :, 0]
        if valid is not None:
            after = torch.where(valid[:, t, None, None, None], after, matrix)
            y = torch.where(valid[:, t, None, None], y, 0)
        matrix = after
        out.append(y)
    return torch.stack(out, 1).to(r.dtype), matrix


def _in_chunks(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None,
    boundaries: Boundaries | None,
) -> tuple[Tensor, Tensor]:
    """By matrix products."""
    batch, length, heads, width = k.shape
    wide = torch.promote_types(r.dtype, torch.float32)
    strips = cut_into_strips(batch, length, CHUNK_SIZE, boundaries, r.device)
    matrix = k.new_zeros(batch, heads, width, v.shape[-1], dtype=wide) if state is None else state.to(wide)
    if not len(strips.row):
        return torch.zeros_like(v, dtype=r.dtype), matrix
    order = _Order.of(strips)
    inputs = [strips.gather(t.to(wide))[order.strips].transpose(1, 2) for t in (r, log_w, k, v, a, b)]
    out, within, decay, added = _chunks(*inputs)

    carried = torch.where(order.carries.view(-1, 1, 1, 1), matrix[order.rows], 0)  # of each run
    entries, exits = [], []
    for turn, gain in zip(decay.split(order.counts), added.split(order.counts), strict=True):
        exits.append(carried[len(turn) :])
        carried = carried[: len(turn)]
        entries.append(carried)
        carried = turn @ carried + gain
    exits.append(carried)
    y = out @ torch.cat(entries) + within
    y = strips.scatter(y.transpose(1, 2)[order.back])
    ends = torch.cat(exits[::-1])
    leaving = torch.where((order.last >= 0).view(-1, 1, 1, 1), ends[order.last], matrix)
    return y.to(r.dtype), leaving


class _Order(NamedTuple):
    """Strips in the order in which states pass through them: the first of every run of strips, then the second, ...

    Attributes:
        strips: (M,) the strip in each place; back: the place of each strip.
        counts: how many runs have a first strip, a second, ...; longer runs come first.
        rows: (S,) of each run; carries: (S,) bool, it continues the entry state.
        last: (B,) the last run of each row, -1 where it has none.
    """

    strips: Tensor
    back: Tensor
    counts: list[int]
    rows: Tensor
    carries: Tensor
    last: Tensor

    @classmethod
    def of(cls, strips: Strips) -> "_Order":
        """Runs are the segments of a piece."""
        heads = strips.first.nonzero()[:, 0]
        run = strips.first.cumsum(0) - 1
        places = torch.arange(len(run), device=run.device) - heads[run]
        lengths = torch.bincount(run, minlength=1)[: len(heads)]
        longest_first = lengths.argsort(descending=True, stable=True)
        rank = longest_first.argsort()
        order = (places * len(heads) + rank[run]).argsort()
        last = torch.where(strips.last >= 0, rank[run[strips.last]], -1)
        counts = torch.bincount(places).tolist()
        where = heads[longest_first]
        return cls(order, order.argsort(), counts, strips.row[where], strips.carries[where], last)


def _chunks(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a chunk makes of the matrix S at its entry.

    Args:
        r, log_w, k, a, b: (M, H, T, K).
        v: (M, H, T, V).

    Returns:
        out (M, H, T, K) and within (M, H, T, V): y = out S + within. decay (M, H, K, K) and added (M, H, K, V): at the
        exit it is decay S + added.
    """
    size = k.shape[-2]
    logs = log_w.cumsum(-2)
    growth, end = (-logs).exp(), logs[..., -1:, :].exp()
    asking = torch.cat([a * (logs - log_w).exp(), r * logs.exp()], -2)  # of S, before each token and after it
    b, k = b * growth, k * growth
    products = asking @ torch.cat([b, k], -2).transpose(-1, -2)  # (M, H, 2 T, 2 T)
    ab, ak, rb, rk = (part for half in products.split(size, -2) for part in half.split(size, -1))
    ab, ak, rb, rk = ab.tril(-1), ak.tril(-1), rb.tril(), rk.tril()
    a, r = asking.split(size, -2)

    # u_t = a_t S_{t-1} depends on those before it: u = a S + ab u + ak v, and ab^T = 0.
    inverse, power, done = ab + torch.eye(size, dtype=ab.dtype, device=ab.device), ab, 1
    while (done := 2 * done) < size:
        power = power @ power
        inverse = inverse + inverse @ power
    u = inverse @ torch.cat([a, ak @ v], -1)
    of_matrix, own = (rb @ u).split([k.shape[-1], v.shape[-1]], -1)
    turn, gain = ((b * end).transpose(-1, -2) @ u).split([k.shape[-1], v.shape[-1]], -1)
    decay = turn + end.transpose(-1, -2) * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return r + of_matrix, own + rk @ v, decay, gain + (k * end).transpose(-1, -2) @ v
