"""Attention of each step to all of its chunk, before and after it: softmax, or the Laplace function of MEGA."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .boundaries import Boundaries
from .laplace import laplace
from .padding import zero_padding
from .rotary import rope, slot_turns

AttentionKind = Literal["softmax", "laplace"]
TILE_SIZE = 256  # queries


@op(rounded=3)
def bidirectional_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    chunk_size: int,
    rope_base: float,
    kind: AttentionKind = "softmax",
    boundaries: Boundaries | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Each step attends to all valid steps of its own chunk.

    Weights are a softmax of the scores q . k, or for n valid keys laplace(q . k / n), which do not sum to 1.

    Args:
        q, k: (B, L, H, dk), not yet rotated, L at least 1.
        v: (B, L, H, dv).
        chunk_size: steps in a chunk; rotary positions restart in each. 0 for one chunk of all.
        rope_base: base of the rotary frequencies.
        kind: of the weights.
        boundaries: row lengths; padding yields 0 and is not seen. Documents are rows of their own here.
        dropout: probability, on the weights.

    Returns:
        (B, L, H, dv).
    """
    batch, length = q.shape[:2]
    lengths = None if boundaries is None else boundaries.lengths
    size = min(chunk_size or length, length)
    table = 1 << (size - 1).bit_length()  # sequences of many lengths share a table of angles
    turns = slot_turns(q, (torch.arange(length) % size).to(q.device), rope_base, table)
    q, k = rope(q, turns), rope(k, turns)
    chunks = -(-length // size)
    valid = None
    if lengths is not None or length % size:
        ends = torch.full((batch,), length) if lengths is None else lengths
        rest = (0, 0, 0, 0, 0, chunks * size - length)
        q, k, v = (t if lengths is None else zero_padding(t, lengths) for t in (q, k, v))
        q, k, v = (F.pad(t, rest) if chunks * size > length else t for t in (q, k, v))
        valid = (torch.arange(chunks * size) < ends[:, None]).to(q.device).view(-1, size)
    q, k, v = (t.reshape(-1, size, *t.shape[2:]).transpose(1, 2) for t in (q, k, v))
    counts = torch.full((len(q),), size) if valid is None else valid.sum(1).clamp(min=1)
    out = [_tile(part, k, v, valid, counts, kind, dropout) for part in q.split(TILE_SIZE, 2)]
    joined = out[0] if len(out) == 1 else torch.cat(out, 2)
    joined = joined.transpose(1, 2).reshape(batch, chunks * size, *v.shape[1:2], v.shape[-1])[:, :length]
    return joined if lengths is None else zero_padding(joined, lengths)


def _tile(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None, counts: Tensor, kind: AttentionKind, dropout: float
) -> Tensor:
    """Some queries (M, H, Q, dk) to all keys (M, H, K, dk) that are valid (M, K); counts (M,) of them."""
    scores = q @ k.transpose(-1, -2)
    if kind == "softmax":
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        if valid is not None:  # a chunk without any sees zeros
            hidden = ~valid & valid.any(1, keepdim=True)
            scores = scores.masked_fill(hidden[:, None, None], -math.inf)
        weights = scores.softmax(-1).to(v.dtype)
    else:
        weights = laplace(scores, counts.to(scores.device), out_dtype=v.dtype)  # of padding too, whose values are 0
    return F.dropout(weights, dropout) @ v
