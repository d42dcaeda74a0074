"""Chunk attention: causal softmax attention inside chunks of c tokens, with rotary positions that restart in each.

The softmax has scale 1: queries and keys come normalised. The scores are computed in rows of tiles up to the diagonal,
because values are wider than queries here, and the fused attention of PyTorch is slow for that.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundaries import Blocks, Boundaries, cut_into_blocks

TILE_SIZE = 256


class KeyValueCache(NamedTuple):
    """Rotated keys (B, c, H, dk) and values (B, c, H, dv) of the unfinished chunk, zero from slot `fill` on.

    `fill` is (B,) int64 and lives on the CPU: it decides shapes.
    """

    keys: Tensor
    values: Tensor
    fill: Tensor


def chunk_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    cache: KeyValueCache | None = None,
    boundaries: Boundaries | None = None,
    dropout: float = 0.0,
    drop_keys: bool = False,
) -> tuple[Tensor, KeyValueCache]:
    """Each token attends to the tokens of its own chunk up to itself.

    Args:
        q, k: (B, L, H, dk), not yet rotated, L at least 1.
        v: (B, L, H, dv).
        chunk_size: c. Chunks and rotary positions restart at each document.
        rope_base: base of the rotary frequencies.
        cache: the unfinished chunk at the entry, or None for an empty one.
        boundaries: of the piece; padding yields 0.
        dropout: probability, already 0 outside training.
        drop_keys: drop scores before the softmax (DropKey, the authors' fused kernel) and not weights after it. A
            token's own key is never dropped.

    Returns:
        (B, L, H, dv), and the unfinished chunk at the exit.
    """
    batch, length = q.shape[:2]
    fill = torch.zeros(batch, dtype=torch.int64) if cache is None else cache.fill
    if boundaries is None and bool((fill == fill[0]).all()):
        slots = (int(fill[0]) + torch.arange(length, device=q.device)) % chunk_size
        q, k = rope(q, slots, rope_base, chunk_size), rope(k, slots, rope_base, chunk_size)
        return _even(q, k, v, chunk_size, cache, int(fill[0]), dropout, drop_keys)

    boundaries = boundaries or Boundaries()
    slots = (boundaries.since_start(fill, length) % chunk_size).to(q.device)
    q, k = rope(q, slots, rope_base, chunk_size), rope(k, slots, rope_base, chunk_size)
    keys_in = cut_into_blocks(batch, length, chunk_size, boundaries, q.device, fill)
    leaving_fill = boundaries.exit_position(fill, length) % chunk_size
    if len(keys_in.row) == 0:
        return torch.zeros_like(v), cache or _empty_cache(k, v, chunk_size, leaving_fill)
    kb, vb = keys_in.gather(k), keys_in.gather(v)
    if cache is not None:
        taken = torch.where(keys_in.carries, fill.to(q.device)[keys_in.row], 0)
        kept = torch.arange(chunk_size, device=q.device) < taken[:, None]
        kb = torch.where(kept[..., None, None], cache.keys[keys_in.row].to(kb.dtype), kb)
        vb = torch.where(kept[..., None, None], cache.values[keys_in.row].to(vb.dtype), vb)

    # Queries sit in windows no wider than the fullest block, so that a step of one token costs one query.
    begin = torch.where(keys_in.carries, fill.to(q.device)[keys_in.row], 0)
    window, width = _windows(keys_in, begin)
    at = begin[:, None] + torch.arange(window.shape[1], device=q.device)  # (M, W) slot of each query
    qb = torch.where((window >= 0)[..., None, None], q.flatten(0, 1)[window.clamp(min=0)], 0)
    visible = torch.arange(width, device=q.device) <= at[..., None]
    out = _attend(qb, kb[:, :width], vb[:, :width], visible[:, None], dropout, drop_keys)
    place = torch.full((batch * length,), -1, device=q.device)
    place[window[window >= 0]] = (window >= 0).flatten().nonzero().squeeze(1)
    flat = torch.where((place >= 0).view(-1, 1, 1), out.flatten(0, 1)[place.clamp(min=0)], 0)

    last = keys_in.last.clamp(min=0)
    leave = leaving_fill.to(q.device)
    kept = (torch.arange(chunk_size, device=q.device) < leave[:, None])[..., None, None]
    touched = (keys_in.last >= 0).view(-1, 1, 1, 1)
    old = cache or _empty_cache(k, v, chunk_size, fill)
    keys = torch.where(touched, torch.where(kept, kb[last], 0), old.keys.to(kb.dtype))
    values = torch.where(touched, torch.where(kept, vb[last], 0), old.values.to(vb.dtype))
    return flat.view_as(v), KeyValueCache(keys, values, leaving_fill)


def _windows(blocks: Blocks, begin: Tensor) -> tuple[Tensor, int]:
    """(M, W) tokens of each block without the slots before `begin`, -1 where there is none; and the slots in use."""
    assert blocks.index is not None
    filled = blocks.index >= 0
    width = int((filled * torch.arange(1, blocks.size + 1, device=begin.device)).max())
    window = torch.arange(int(filled.sum(1).max()), device=begin.device)
    slots = begin[:, None] + window
    inside = slots < blocks.size
    return torch.where(inside, blocks.index.gather(1, slots.clamp(max=blocks.size - 1)), -1), width


def _even(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    cache: KeyValueCache | None,
    fill: int,
    dropout: float,
    drop_keys: bool,
) -> tuple[Tensor, KeyValueCache]:
    """All rows stand at the same slot and run on: finish the open chunk, take the whole ones, begin the next."""
    length = q.shape[1]
    out = []
    open_k, open_v = k[:, :0], v[:, :0]
    if cache is not None and fill:
        open_k, open_v = cache.keys[:, :fill].to(k.dtype), cache.values[:, :fill].to(v.dtype)
    at = 0
    if fill:
        at = min(chunk_size - fill, length)
        open_k, open_v = torch.cat([open_k, k[:, :at]], 1), torch.cat([open_v, v[:, :at]], 1)
        out.append(causal_attention(q[:, :at], open_k, open_v, dropout, drop_keys))
    whole = (length - at) // chunk_size * chunk_size
    if whole:
        qs, ks, vs = (t[:, at : at + whole].unflatten(1, (-1, chunk_size)).flatten(0, 1) for t in (q, k, v))
        out.append(causal_attention(qs, ks, vs, dropout, drop_keys).reshape(len(q), whole, *v.shape[2:]))
        at += whole
    if at < length:
        open_k, open_v = k[:, at:], v[:, at:]
        out.append(causal_attention(q[:, at:], open_k, open_v, dropout, drop_keys))
    fill = (fill + length) % chunk_size
    padding = (0, 0, 0, 0, 0, chunk_size - fill)
    leaving = KeyValueCache(
        F.pad(open_k[:, :fill], padding), F.pad(open_v[:, :fill], padding), torch.full((len(q),), fill)
    )
    return out[0] if len(out) == 1 else torch.cat(out, 1), leaving


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0, drop_keys: bool = False) -> Tensor:
    """Softmax attention with scale 1 of the last Lq of Lk tokens to everything up to themselves.

    Args:
        q: (B, Lq, H, dk).
        k: (B, Lk, H, dk), Lk at least Lq.
        v: (B, Lk, H, dv).
        dropout, drop_keys: as in chunk_attention.

    Returns:
        (B, Lq, H, dv).
    """
    queries, before = q.shape[1], k.shape[1] - q.shape[1]
    rows = []
    for start in range(0, queries, TILE_SIZE):
        stop = min(start + TILE_SIZE, queries)
        at = torch.arange(before + start, before + stop, device=q.device)
        visible = torch.arange(before + stop, device=q.device) <= at[:, None]
        seen = slice(0, before + stop)
        rows.append(_attend(q[:, start:stop], k[:, seen], v[:, seen], visible, dropout, drop_keys))
    return rows[0] if len(rows) == 1 else torch.cat(rows, 1)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, dropout: float, drop_keys: bool) -> Tensor:
    """Softmax attention of q (B, Lq, H, dk) to k, v (B, Lk, H, .) where `visible`, broadcast to (B, H, Lq, Lk)."""
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


def _empty_cache(k: Tensor, v: Tensor, chunk_size: int, fill: Tensor) -> KeyValueCache:
    return KeyValueCache(
        k.new_zeros(len(k), chunk_size, *k.shape[2:]), v.new_zeros(len(v), chunk_size, *v.shape[2:]), fill
    )


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
    cos, sin = (t[slots].unsqueeze(-2) for t in rotations(highest, x.shape[-1], base, dtype, x.device))
    even, odd = x.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x.dtype)


@lru_cache(maxsize=16)
def rotations(highest: int, dim: int, base: float, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin of all positions, (highest, dim / 2)."""
    with torch.inference_mode(False):
        frequency = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angle = torch.arange(highest, dtype=torch.float64)[:, None] * frequency
        return angle.cos().to(device, dtype), angle.sin().to(device, dtype)
