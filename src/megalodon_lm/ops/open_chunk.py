"""The unfinished chunk at the exit of a piece, out of its last tokens and of the cache at its entry."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundaries import take


def open_chunk(piece: Tensor, cached: Tensor | None, stops: Tensor, fill: Tensor, chunk_size: int) -> Tensor:
    """Keys or values of the unfinished chunks.

    Args:
        piece: (B, L, H, d).
        cached: (B, c, H, d) the unfinished chunks at the entry, or None for empty ones.
        stops: (B,) int64, tokens of each row.
        fill: (B,) int64, tokens of the unfinished chunk at the exit.
        chunk_size: c.

    Returns:
        (B, c, H, d), zero from slot `fill` on.
    """
    slot = torch.arange(chunk_size)
    token = (stops - fill)[:, None] + slot
    used = slot < fill[:, None]
    rows = torch.arange(len(fill))[:, None] * piece.shape[1]
    taken = take(piece.flatten(0, 1), torch.where(used & (token >= 0), rows + token, -1).to(piece.device))
    if cached is None:
        return taken
    return torch.where((used & (token < 0)).to(piece.device)[..., None, None], cached.to(piece.dtype), taken)


def even_open_chunk(piece: Tensor, cached: Tensor | None, fill: int, chunk_size: int) -> Tensor:
    """`open_chunk` where no row is padded and all end at one slot."""
    old = fill - piece.shape[1]
    if old <= 0:
        return F.pad(piece[:, piece.shape[1] - fill :], (0, 0, 0, 0, 0, chunk_size - fill))
    assert cached is not None
    empty = piece.new_zeros(len(piece), chunk_size - fill, *piece.shape[2:])
    return torch.cat([cached[:, :old].to(piece.dtype), piece, empty], 1)
