"""TimestepNorm: cumulative group normalisation over time.

The statistics are sums of shifted moments, in float64 and with the shift at the mean where the piece begins, so that
neither a large mean nor ten million tokens wear them down.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, cut_into_strips

STRIP_SIZE = 64


class NormState(NamedTuple):
    """Running statistics of B rows and G groups: tokens seen (B,) int64, mean and variance (B, G) float64."""

    count: Tensor  # type: ignore[assignment]
    mean: Tensor
    var: Tensor


@op()
def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    boundaries: Boundaries | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, NormState]:
    """Normalise each token with the mean and variance of all scalars of its group so far, itself included.

    Args:
        x: (B, L, D), L at least 1.
        weight: (D,), stored as an offset from 1.
        bias: (D,).
        num_groups: G, a divisor of D.
        eps: added to the variance.
        state: statistics at the entry, or None for none.
        boundaries: documents restart from nothing; padding yields 0 and leaves the statistics alone.
        out_dtype: type of y; that of x by default.

    Returns:
        y (B, L, D), and the statistics at the exit.
    """
    batch, length, _ = x.shape
    strips = cut_into_strips(batch, length, STRIP_SIZE, boundaries, x.device)
    groups, token_mean, token_var = moments_of_tokens(x, num_groups)
    means = strips.gather(token_mean.double())  # (M, T, G)

    # Moments are taken about the entry mean, or about the first token of a document that starts here.
    shift = means[:, 0].detach()
    steps = torch.arange(len(shift), device=x.device)
    slots = torch.where(strips.first, strips.segment, len(shift))
    # For each strip the first one of its segment.
    began = steps.new_zeros(len(shift) + 1).scatter(0, slots, steps)[strips.segment]
    shift = shift[began]  # (M, G)
    before = torch.zeros(len(shift), dtype=torch.float64, device=x.device)  # tokens before the piece
    if state is not None:
        continued = strips.carries[began]
        before = torch.where(continued, state.count[strips.row], 0).double()
        shift = torch.where((before > 0)[:, None], state.mean[strips.row], shift)

    ones = torch.ones(batch, length, 1, dtype=torch.float64, device=x.device)
    taken = strips.gather(ones)  # (M, T, 1): 1 in used slots
    offset = (means - shift[:, None]) * taken
    moments = torch.cat([offset, offset.square() + strips.gather(token_var.double()), taken], -1).cumsum(1)
    moments = moments + strips.carry(moments[:, -1], None)[:, None]
    first, second, count = moments.split([num_groups, num_groups, 1], -1)
    count = count + before[:, None, None]
    if state is not None:
        entered = torch.where((before > 0)[:, None], before[:, None] * state.var[strips.row], 0)
        second = second + entered[:, None]
    drift = first / count.clamp(min=1)
    mean = shift[:, None] + drift
    var = (second / count.clamp(min=1) - drift.square()).clamp(min=0)

    statistics = strips.scatter(torch.cat([mean, (var + eps).rsqrt()], -1)).to(groups.dtype)
    y = normalise(groups, statistics, weight, bias, boundaries)
    at = (strips.last.clamp(min=0), strips.used.clamp(min=1) - 1)
    leaving = NormState(count[at].squeeze(-1).round().long(), mean[at], var[at])
    if boundaries is not None and boundaries.lengths is not None:
        entry = state if state is not None else empty_norm_state(batch, num_groups, x.device)
        leaving = unless_empty(boundaries.lengths, leaving, entry)
    return y.to(out_dtype or x.dtype), leaving


def moments_of_tokens(x: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    """x as groups (B, L, G, D / G), and each token's mean and variance of them (B, L, G), in float32 or better."""
    groups = x.to(torch.promote_types(x.dtype, torch.float32)).view(*x.shape[:2], num_groups, -1)
    mean = groups.mean(-1, keepdim=True)
    return groups, mean.squeeze(-1), (groups - mean).square().mean(-1)


def normalise(
    groups: Tensor, statistics: Tensor, weight: Tensor, bias: Tensor, boundaries: Boundaries | None
) -> Tensor:
    """y (B, L, D), zero at padding, from groups and their mean and 1 / deviation, side by side (B, L, 2 G)."""
    batch, length = groups.shape[:2]
    centre, scale = (s.unsqueeze(-1) for s in statistics.chunk(2, -1))
    y = ((groups - centre) * scale).view(batch, length, -1) * (weight.to(groups.dtype) + 1) + bias.to(groups.dtype)
    if boundaries is not None and boundaries.lengths is not None:
        y = torch.where(boundaries.valid(length)[..., None].to(y.device), y, 0)
    return y


def unless_empty(lengths: Tensor, leaving: NormState, entry: NormState) -> NormState:
    """What leaves rows of these lengths: what entered, where there is no token."""
    empty = (lengths == 0).to(entry.mean.device)
    return NormState(
        torch.where(empty, entry.count, leaving.count),
        torch.where(empty[:, None], entry.mean, leaving.mean),
        torch.where(empty[:, None], entry.var, leaving.var),
    )


def empty_norm_state(batch: int, num_groups: int, device: torch.device | None = None) -> NormState:
    """Statistics of nothing."""
    zero = torch.zeros(batch, num_groups, dtype=torch.float64, device=device)
    return NormState(torch.zeros(batch, dtype=torch.int64, device=device), zero, zero.clone())
