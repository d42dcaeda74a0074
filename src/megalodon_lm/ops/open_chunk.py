"""What later tokens will see of a piece: its last tokens, and before them the last ones of the cache at its entry."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundaries import take


def open_chunk(
    piece: Tensor, cached: Tensor | None, stops: Tensor, fill: Tensor, size: int, entry: Tensor | None = None
) -> Tensor:
    """Keys or values of the cache at the exit, as after an unfinished chunk.

    Args:
        piece: (B, L, H, d).
        cached: (B, size, H, d) at the entry, or None for nothing.
        stops: (B,) int64, tokens of each row.
        fill: (B,) int64, entries used at the exit.
        size: entries of a cache.
        entry: (B,) int64, those used at the entry; None if what is still used at the exit stays in its place.

    Returns:
        (B, size, H, d), zero from entry `fill` on.
    """
    slot = torch.arange(size)
    token = (stops - fill)[:, None] + slot
    used = slot < fill[:, None]
    batch, length = piece.shape[:2]
    rows = torch.arange(batch)[:, None]
    taken = take(piece.flatten(0, 1), torch.where(used & (token >= 0), rows * length + token, -1).to(piece.device))
    if cached is None:
        return taken
    old = used & (token < 0)
    if entry is not None:
        moved = torch.where(old, rows * size + entry[:, None] + token, -1)
        cached = take(cached.flatten(0, 1), moved.to(piece.device))
    return torch.where(old.to(piece.device)[..., None, None], cached.to(piece.dtype), taken)


def even_open_chunk(piece: Tensor, cached: Tensor | None, fill: int, size: int, entry: int | None = None) -> Tensor:
    """`open_chunk` where no row is padded and all have one number of entries at the entry, and one at the exit."""
    old = fill - piece.shape[1]
    if old <= 0:
        return F.pad(piece[:, piece.shape[1] - fill :], (0, 0, 0, 0, 0, size - fill))
    assert cached is not None
    empty = piece.new_zeros(len(piece), size - fill, *piece.shape[2:])
    first = 0 if entry is None else entry - old
    return torch.cat([cached[:, first : first + old].to(piece.dtype), piece, empty], 1)
