"""Mixtures of each token with the one before it, as RWKV makes them in front of its projections."""

import torch
from torch import Tensor

from .boundaries import Boundaries


def token_shift(
    x: Tensor, mix: Tensor, state: Tensor | None = None, boundaries: Boundaries | None = None
) -> tuple[Tensor, Tensor]:
    """y_{n,t} = x_t + mix_n (x_{t-1} - x_t).

    Args:
        x: (B, L, D), L at least 1.
        mix: (N, D).
        state: (B, D) the token before the piece, or None for zeros.
        boundaries: the first token of a document has zeros before it; padding yields 0.

    Returns:
        y (N, B, L, D), and the last token (B, D), both in the type of x.
    """
    entry = torch.zeros_like(x[:, 0]) if state is None else state.to(x.dtype)
    before = torch.cat([entry[:, None], x[:, :-1]], 1)
    leaving = x[:, -1]
    if boundaries is not None and boundaries.starts is not None:
        before = torch.where(boundaries.starts[..., None].to(x.device), 0, before)
    if boundaries is not None and boundaries.lengths is not None:
        lengths = boundaries.lengths.to(x.device)
        last = x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]
        leaving = torch.where((lengths > 0)[:, None], last, entry)
    wide = torch.promote_types(x.dtype, torch.float32)
    x = x.to(wide)
    y = torch.addcmul(x, before.to(wide) - x, mix.to(wide)[:, None, None]).to(entry.dtype)
    if boundaries is not None and boundaries.lengths is not None:
        y = torch.where(boundaries.valid(x.shape[1])[..., None].to(x.device), y, 0)
    return y, leaving
