"""The gated delta rule: a memory that forgets, and that corrects what it holds under a key instead of adding to it.

Source: Yang et al. 2024 (arXiv 2412.06464). In a chunk, what each token writes solves a triangular system: the WY form
of a product of Householder-like factors.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, Strips
from .chunked_recurrence import between, by_heads, carry, in_chunks, sums_of_logs


@op(rounded=3)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = alpha_t S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T; y_t = S_t q_t, with alpha = exp(log_decay).

    Args:
        q: (B, L, H, N), L at least 1.
        k: (B, L, H, N), of norm at most 1.
        v: (B, L, H, P).
        log_decay: (B, L, H), at most 0.
        beta: (B, L, H), from 0 to 1: how much of what k holds is replaced; up to 2 it stays stable.
        state: (B, H, N, P), S transposed, at the entry; None for zero.
        boundaries: documents begin with zero; padding yields 0 and leaves S alone.

    Returns:
        y (B, L, H, P) in the type of v, and S transposed at the exit, in float32 or better.
    """
    return in_chunks(lambda strips: _over_strips(q, k, v, log_decay, beta, state, strips), q, boundaries)


def _over_strips(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, state: Tensor | None, strips: Strips
) -> tuple[Tensor, Tensor]:
    heads, wide = q.shape[2], torch.promote_types(q.dtype, torch.float32)
    log_decay, beta = (by_heads(x.to(wide), strips) for x in (log_decay, beta))  # (M, H, T)
    given = [by_heads(x, strips) for x in (q, k, v)] + [sums_of_logs(log_decay), beta]
    read, own, change, added = (x.unflatten(0, (-1, heads)) for x in _Chunk.apply(*(x.flatten(0, 1) for x in given)))
    before, leaving = carry(change, added, None if state is None else state.to(wide), strips, q.dtype)
    y = torch.baddbmm(*(x.flatten(0, 1) for x in (own, read, before))).unflatten(0, (-1, heads))
    return strips.scatter(y.transpose(1, 2)).to(v.dtype), leaving


class _Chunk(torch.autograd.Function):
    """What chunks (M, T, ...) do to the state S (N, P) before them: y = own + read S, and S becomes added + change S.

    Products are made in the type of q; the inverse, and all that S is multiplied with from chunk to chunk, in float32
    or better. By hand, because autograd would keep and pass over several times as many matrices (T, T).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, sums: Tensor, beta: Tensor) -> tuple[Tensor, ...]:
        dtype, wide = q.dtype, beta.dtype
        size, dim = q.shape[1:]
        decays, since, left = between(sums, sums, dtype), sums.exp(), (sums[:, -1:] - sums).exp()
        queries_and_keys = torch.cat([q, k], 1)
        scores = torch.bmm(queries_and_keys, k.mT)
        attention = scores[:, :size] * decays
        system = (scores[:, size:] * decays).to(wide).mul_(beta[..., None])
        solution = unit_lower_inverse(system).to(dtype)
        source = q.new_empty(*k.shape[:2], dim + v.shape[-1])
        torch.mul(k, (since * beta)[..., None], out=source[..., :dim])
        torch.mul(v, beta[..., None], out=source[..., dim:])
        written = torch.bmm(solution, source)  # by each token: what is in dim: on, less what S has under what is before
        own = torch.bmm(attention, written)
        kept = (k * left[..., None]).to(dtype)
        gained = torch.bmm(kept.mT, written).to(wide)
        read = (q * since[..., None]).sub_(own[..., :dim]).to(dtype)
        change = gained[..., :dim].neg()
        change.diagonal(dim1=-2, dim2=-1).add_(since[:, -1:])
        ctx.save_for_backward(
            queries_and_keys, v, beta, decays, since, left, scores, attention, solution, written, kept
        )
        return read, own[..., dim:], change, gained[..., dim:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        queries_and_keys, v, beta, decays, since, left, scores, attention, solution, written, kept = ctx.saved_tensors
        to_read, to_own, to_change, to_added = grads
        size, dtype, wide = v.shape[1], v.dtype, beta.dtype
        q, k = queries_and_keys.split(size, 1)
        dim = q.shape[-1]
        to_out = torch.cat([-to_read, to_own], -1)
        to_gained = torch.cat([-to_change, to_added], -1).to(dtype)

        to_written = torch.baddbmm(torch.bmm(attention.mT, to_out), kept, to_gained)
        to_source = torch.bmm(solution.mT, to_written)
        to_scores = torch.empty_like(scores)
        torch.mul(torch.bmm(to_out, written.mT), decays, out=to_scores[:, :size])
        to_system = torch.bmm(to_source, written.mT).mul_(decays)  # times -1
        to_system.diagonal(dim1=-2, dim2=-1).zero_()
        torch.mul(to_system, -beta[..., None], out=to_scores[:, size:])
        to_beta = -(to_system * scores[:, size:]).sum(-1, dtype=wide)
        of_scores = to_scores * scores  # that of the logarithms of both matrices
        to_sums = of_scores.sum(-1, dtype=wide).unflatten(1, (2, -1)).sum(1) - of_scores.sum(1, dtype=wide)

        to_queries, to_keys = torch.bmm(to_scores, k).split(size, 1)
        to_keys = torch.baddbmm(to_keys, to_scores.mT, queries_and_keys)
        from_keys, from_values = to_source.split([dim, v.shape[-1]], -1)
        from_keys = from_keys * since[..., None]
        to_kept = torch.bmm(written, to_gained.mT) * left[..., None]
        read_since = to_read * since[..., None]
        of_keys, of_kept = (from_keys * k).sum(-1), (to_kept * k).sum(-1)
        to_sums += of_keys * beta + (read_since * q).sum(-1) - of_kept
        to_sums[:, -1] += of_kept.sum(-1) + to_change.diagonal(dim1=-2, dim2=-1).sum(-1) * since[:, -1]
        to_beta += of_keys + (from_values * v).sum(-1, dtype=wide)
        return (
            read_since.add_(to_queries).to(dtype),
            to_kept.add_(to_keys).add_(from_keys.mul_(beta[..., None])).to(dtype),
            (from_values * beta[..., None]).to(dtype),
            to_sums,
            to_beta,
        )


def unit_lower_inverse(lower: Tensor, block: int = 8) -> Tensor:
    """(I + lower)^-1 for strictly lower triangular matrices (M, T, T).

    Diagonal blocks are inverted by substitution, then joined two by two: most of it is products, and unlike a series of
    powers nothing grows that cancels in the end.
    """
    count, size = len(lower), lower.shape[-1]
    blocks = 1 << (-(-size // block) - 1).bit_length()
    lower = F.pad(lower, (0, blocks * block - size) * 2)

    def diagonal(width: int) -> Tensor:
        parts = lower.view(count, -1, width, lower.shape[-1] // width, width)
        return parts.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (M, blocks, width, width)

    identity = torch.eye(block, dtype=lower.dtype, device=lower.device).expand(count, blocks, -1, -1)
    inverse = torch.linalg.solve_triangular(diagonal(block), identity, upper=False, unitriangular=True)
    while (width := inverse.shape[-1]) < lower.shape[-1]:
        first, second, below = inverse[:, ::2], inverse[:, 1::2], diagonal(2 * width)[..., width:, :width]
        inverse = lower.new_zeros(count, first.shape[1], 2 * width, 2 * width)
        inverse[..., :width, :width], inverse[..., width:, width:] = first, second
        inverse[..., width:, :width] = (second @ below @ first).neg_()
    return inverse[:, 0, :size, :size]
