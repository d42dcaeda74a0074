"""The selective scan of Mamba: a diagonal state space model whose step, input and output depend on the token.

The portable path takes strips of tokens one after the other. Inside one, decays and states are combined by recursive
doubling, and the backward pass computes them anew, so that no tensor of size L x D x N exists, nothing is divided by a
product of decays, and no loop runs over tokens.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .backend import op
from .boundaries import Boundaries

STRIP_SIZE = 32


@op()
def selective_scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t; y_t = sum_n c_{t,n} h_{t,n} + skip x_t (Gu & Dao, arXiv 2312.00752).

    Args:
        x: (B, L, D), L at least 1.
        dt: (B, L, D), at least 0: how far a token moves the state.
        a: (D, N), at most 0.
        b, c: (B, L, N), which all channels share.
        skip: (D,).
        state: (B, D, N) h at the entry, or None for zero.
        boundaries: documents restart from zero; padding yields 0 and leaves h alone.

    Returns:
        y (B, L, D) in the type of x, and h at the exit (B, D, N), both computed in that of a, float32 or better.
    """
    batch, length, _ = x.shape
    dtype = torch.promote_types(a.dtype, torch.float32)
    xs, dt, a, b, c = (t.to(dtype) for t in (x, dt, a, b, c))
    h = a.new_zeros(batch, *a.shape) if state is None else state.to(dtype)
    starts = padding = None
    if boundaries is not None and boundaries.starts is not None:
        starts = (boundaries.starts & boundaries.valid(length)).to(x.device)
    if boundaries is not None and boundaries.lengths is not None:
        padding = ~boundaries.valid(length).to(x.device)[..., None]
        xs, dt, b, c = (t.masked_fill(padding, 0) for t in (xs, dt, b, c))
    out = []
    for first in range(0, length, STRIP_SIZE):
        piece = slice(first, first + STRIP_SIZE)
        tokens: list[Any] = [None if t is None else t[:, piece] for t in (xs, dt, b, c, starts, padding)]
        if torch.is_grad_enabled():
            y, h = checkpoint(_strip, a, h, *tokens, use_reentrant=False, preserve_rng_state=False)
        else:
            y, h = _strip(a, h, *tokens)
        out.append(y)
    y = torch.cat(out, 1) + skip.to(dtype) * xs
    return (y if padding is None else y.masked_fill(padding, 0)).to(x.dtype), h


def _strip(
    a: Tensor, entry: Tensor, x: Tensor, dt: Tensor, b: Tensor, c: Tensor, starts: Tensor | None, padding: Tensor | None
) -> tuple[Tensor, Tensor]:
    """sum_n c h of a few tokens, and h after them. A document's first token sees nothing of the state before it."""
    exponent = dt[..., None] * a  # (B, T, D, N)
    decay = torch.exp(exponent if padding is None else exponent.masked_fill(padding[..., None], 0))
    h = (dt * x)[..., None] * b[:, :, None]
    fresh = None
    if starts is not None:
        fresh = starts[..., None, None]  # whether a document starts in the run of tokens that is combined so far
        h = h + 0 * decay  # a decay that is not finite reaches a first token too
    step, length = 1, x.shape[1]
    while step < length:
        before = decay[:, step:] * h[:, :-step]
        if fresh is not None:
            before = torch.where(fresh[:, step:], 0, before)
            fresh = torch.cat([fresh[:, :step], fresh[:, step:] | fresh[:, :-step]], 1)
        h = torch.cat([h[:, :step], h[:, step:] + before], 1)
        decay = torch.cat([decay[:, :step], decay[:, step:] * decay[:, :-step]], 1)
        step *= 2
    before = decay * entry[:, None]
    h = h + (before if fresh is None else torch.where(fresh, 0, before))
    return torch.einsum("btdn,btn->btd", h, c), h[:, -1]
