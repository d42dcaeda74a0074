"""Rotary positions: pairs of features turned by an angle that grows with the place of a token."""

from functools import lru_cache

import torch
from torch import Tensor


def rope(x: Tensor, slots: Tensor, base: float, highest: int) -> Tensor:
    """Rotate adjacent pairs (2i, 2i+1) of the last dimension by slot * base^(-2i/d), in float32 or better.

    Args:
        x: (B, L, H, d), d even.
        slots: (L,) or (B, L) int64 positions below `highest`.
        base: of the frequencies.
        highest: number of positions that may occur.

    Returns:
        The rotated tensor in the type of x.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    turns = rotations.__wrapped__ if torch.compiler.is_compiling() else rotations  # a graph cannot look up what is kept
    cos, sin = (t[slots].unsqueeze(-2) for t in turns(highest, x.shape[-1], base, dtype, x.device))
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
def rotations(highest: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions, (highest, dim / 2)."""
    with torch.inference_mode(False):
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(highest, dtype=torch.float64)[:, None] * frequency
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)
