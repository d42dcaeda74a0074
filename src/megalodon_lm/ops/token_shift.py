"""Mixtures of each token with the one before it, as RWKV makes them in front of its projections."""

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries


@op()
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
    entry = entry_token(x, state)
    before = torch.cat([entry[:, None], x[:, :-1]], 1)
    if boundaries is not None and boundaries.starts is not None:
        before = torch.where(boundaries.starts[..., None].to(x.device), 0, before)
    wide = torch.promote_types(x.dtype, torch.float32)
    own = x.to(wide)
    y = torch.addcmul(own, before.to(wide) - own, mix.to(wide)[:, None, None]).to(x.dtype)
    if boundaries is not None and boundaries.lengths is not None:
        y = torch.where(boundaries.valid(x.shape[1])[..., None].to(x.device), y, 0)
    return y, last_token(x, entry, boundaries)


def entry_token(x: Tensor, state: Tensor | None) -> Tensor:
    """The token before x (B, L, D): that of the state, or zeros (B, D)."""
    return torch.zeros_like(x[:, 0]) if state is None else state.to(x.dtype)


def last_token(x: Tensor, entry: Tensor, boundaries: Boundaries | None) -> Tensor:
    """The last token of each row of x (B, L, D), and that of the entry (B, D) where a row has none."""
    if boundaries is None or boundaries.lengths is None:
        return x[:, -1]
    lengths = boundaries.lengths.to(x.device)
    last = x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]
    return torch.where((lengths > 0)[:, None], last, entry)
