"""Rotary positions: pairs of features turned by an angle that grows with the place of a token."""

from functools import lru_cache

import torch
from torch import Tensor

Turns = tuple[Tensor, Tensor]
"""cos and sin of the angles of some tokens, (L, d / 2) or (B, L, d / 2)."""
Base = float | tuple[float, ...]
"""Base of the rotary frequencies base^(-2i/d), or the d / 2 frequencies themselves, where they follow another rule."""


def rope(x: Tensor, turns: Turns, heads_without_rope: int = 0) -> Tensor:
    """Rotate the adjacent pairs (2i, 2i+1) of the last dimension, in float32 or better.

    Args:
        x: (B, L, H, d), d even.
        turns: from `slot_turns` or `document_turns`.
        heads_without_rope: as many heads at the end stay as they are.

    Returns:
        The rotated tensor in the type of x.
    """
    if heads_without_rope:
        turned, left = x.tensor_split([x.shape[2] - heads_without_rope], 2)
        return torch.cat([rope(turned, turns), left], 2)
    cos, sin = (t.unsqueeze(-2) for t in turns)
    even, odd = x.to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


def slot_turns(x: Tensor, slots: Tensor, base: Base, highest: int) -> Turns:
    """For x (B, L, H, d) at the positions `slots`, (L,) or (B, L) int64 below `highest`: angles slot * base^(-2i/d)."""
    cos, sin = _table(x, base, highest)
    return cos[slots], sin[slots]


def document_turns(x: Tensor, positions: Tensor, base: Base, chunk_size: int) -> Turns:
    """For x (B, L, H, d) at the positions in a document, (L,) or (B, L) int64 on the CPU, however large.

    The angle of a place in a chunk, out of a table, and that of the chunk's start, in float64: a float32 angle would
    be wrong by 0.1 at four million.
    """
    if torch.compiler.is_compiling():
        return _turns(positions, x.shape[-1], base, _dtype(x), x.device)
    starts, chunk = (positions - positions % chunk_size).unique(return_inverse=True)
    cos, sin = slot_turns(x, (positions % chunk_size).to(x.device), base, chunk_size)
    start_cos, start_sin = (t[chunk.to(x.device)] for t in _turns(starts, x.shape[-1], base, _dtype(x), x.device))
    return cos * start_cos - sin * start_sin, sin * start_cos + cos * start_sin


def _dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _table(x: Tensor, base: Base, highest: int) -> Turns:
    kept = rotations.__wrapped__ if torch.compiler.is_compiling() else rotations  # a graph cannot look up what is kept
    return kept(highest, x.shape[-1], base, _dtype(x), x.device)


@lru_cache(maxsize=16)
def rotations(highest: int, dim: int, base: Base, dtype: torch.dtype, device: torch.device) -> Turns:
    """cos and sin of all positions, (highest, dim / 2)."""
    with torch.inference_mode(False):
        return _turns(torch.arange(highest), dim, base, dtype, device)


def frequencies(dim: int, base: Base) -> Tensor:
    """Angles of one step, (dim / 2,) float64."""
    if isinstance(base, tuple):
        assert len(base) == dim // 2
        return torch.tensor(base, dtype=torch.float64)
    return base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)


def _turns(positions: Tensor, dim: int, base: Base, dtype: torch.dtype, device: torch.device) -> Turns:
    """cos and sin of positions (...), (..., dim / 2), by float64."""
    angle = positions.double()[..., None] * frequencies(dim, base)
    return angle.cos().to(device, dtype), angle.sin().to(device, dtype)
