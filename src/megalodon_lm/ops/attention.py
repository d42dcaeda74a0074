"""Softmax attention where each query sees a run of keys, computed in tiles of queries.

The softmax has scale 1: queries and keys come normalised. Values are wider than queries here, and PyTorch's fused
attention is slow for that. A tile takes no key that lies beyond the reach of all its queries.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

TILE_SIZE = 256


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    low: Tensor,
    high: Tensor,
    reach: Sequence[int],
    window: int | None = None,
    dropout: float = 0.0,
    drop_keys: bool = False,
) -> Tensor:
    """Attention of each query to the keys low..high.

    Args:
        q: (M, Q, H, dk).
        k: (M, K, H, dk).
        v: (M, K, H, dv).
        low, high: (M or 1, Q) int64, the first key that a query sees, and the last one.
        reach: for each query, the key after the last one that it may see in any row.
        window: most keys that a query may see, or None for all within reach.
        dropout: probability.
        drop_keys: drop scores before the softmax and not weights after it, but never the last visible one.

    Returns:
        (M, Q, H, dv).
    """
    rows = []
    for start in range(0, q.shape[1], TILE_SIZE):
        tile = slice(start, start + TILE_SIZE)
        keys = slice(0 if window is None else max(reach[start] - window, 0), max(reach[tile]))
        key = torch.arange(keys.start, keys.stop, device=q.device)
        visible = (key >= low[:, tile, None]) & (key <= high[:, tile, None])
        rows.append(_attend(q[:, tile], k[:, keys], v[:, keys], visible[:, None], dropout, drop_keys))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, drop_keys: bool = False) -> Tensor:
    """Attention of the last Q of K tokens to everything up to themselves; see `attend`."""
    queries, before = q.shape[1], k.shape[1] - q.shape[1]
    high = torch.arange(before, before + queries, device=q.device)[None]
    reach = range(before + 1, before + queries + 1)
    return attend(q, k, v, torch.zeros_like(high), high, reach, None, dropout, drop_keys)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float, drop_keys: bool) -> Tensor:
    """One tile, where `visible`, broadcast to (M, H, Q, K)."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    if dropout and drop_keys:
        own = visible & ~F.pad(visible[..., 1:], (0, 1))  # the last visible key of each query
        shape = (*q.shape[:3], k.shape[2])
        visible = visible & (own | (torch.rand(shape, device=q.device) >= dropout))
    scores = q @ k.transpose(-1, -2)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).masked_fill(~visible, float("-inf"))
    weights = scores.softmax(-1).to(v.dtype)
    if dropout and not drop_keys:
        weights = F.dropout(weights, dropout)
    return (weights @ v).transpose(1, 2)
