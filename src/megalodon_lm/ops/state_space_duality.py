"""State space duality: a state space model with one decay a head, computed as attention within chunks (Mamba-2).

Source: Dao & Gu 2024 (arXiv 2405.21060).
"""

from typing import Any

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, cut_into_strips
from .chunked_recurrence import CHUNK_SIZE, by_heads, carry, decays, to_log_decay


@op(rounded=3)
def state_space_duality(
    x: Tensor,
    b: Tensor,
    c: Tensor,
    log_decay: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = alpha_t S_{t-1} + b_t x_t^T; y_t = S_t^T c_t, with alpha = exp(log_decay), one a head.

    Args:
        x: (B, L, H, P), times its step size; L at least 1.
        b, c: (B, L, G, N); H / G heads after each other share those of a group.
        log_decay: (B, L, H), at most 0.
        state: (B, H, N, P) at the entry, or None for zero.
        boundaries: documents begin with zero; padding yields 0 and leaves S alone.

    Returns:
        y (B, L, H, P) in the type of x, and S at the exit, in float32 or better.
    """
    batch, length, heads, _ = x.shape
    groups = b.shape[2]
    wide = torch.promote_types(x.dtype, torch.float32)
    strips = cut_into_strips(batch, length, CHUNK_SIZE, boundaries, x.device)
    b, c = (by_heads(t, strips) for t in (b, c))  # (M, G, T, N)
    x, logs = strips.gather(x), strips.gather(log_decay.to(wide))  # (M, T, H, P) and (M, T, H)

    attention = _Decayed.apply(c @ b.mT, logs.transpose(1, 2))
    own = (attention @ x.transpose(1, 2)).transpose(1, 2)  # (M, T, H, P)

    sums = logs.cumsum(1)
    kept = (x * (sums[:, -1:] - sums).exp()[..., None]).to(x.dtype)
    added = b.mT @ _by_groups(kept, groups)  # (M, G, N, P of all heads of the group)
    change = sums[:, -1].exp().view(-1, groups, 1, heads // groups, 1)
    entry = None if state is None else state.to(wide).unflatten(1, (groups, -1)).transpose(2, 3)
    before, leaving = carry(change, added.to(wide).unflatten(-1, (heads // groups, -1)), entry, strips)
    read = (c @ before.flatten(-2).to(c.dtype)).transpose(1, 2).reshape(x.shape)
    y = torch.addcmul(own.to(wide), read.to(wide), sums.exp()[..., None])
    return strips.scatter(y).to(x.dtype), leaving.transpose(2, 3).flatten(1, 2)


def _by_groups(x: Tensor, groups: int) -> Tensor:
    """(M, T, H, P) to (M, G, T, P of all heads of the group)."""
    return x.unflatten(2, (groups, -1)).transpose(1, 2).flatten(-2)


class _Decayed(torch.autograd.Function):
    """Scores of groups (M, G, T, T) times the decays of heads, from (M, H, T): (M, H, T, T)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, log_decay: Tensor) -> Tensor:
        between, _ = decays(log_decay)
        attention = (scores[:, :, None] * between.unflatten(1, (scores.shape[1], -1))).to(scores.dtype).flatten(1, 2)
        ctx.save_for_backward(between, attention)
        ctx.groups = scores.shape[1]
        return attention

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        between, attention = ctx.saved_tensors
        to_scores = (grads[0] * between).unflatten(1, (ctx.groups, -1)).sum(2).to(attention.dtype)
        return to_scores, to_log_decay((grads[0] * attention).to(between.dtype))
