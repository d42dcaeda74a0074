"""Timestep decay normalisation: group normalisation with moving averages of the statistics, which forget.

As TimestepNorm, but an old token counts less than a new one: mean and variance are those of the last thousand and the
last ten thousand tokens or so. Source: Gecko, Ma et al. 2026 (arXiv 2601.06463).

Inside a strip the averages are a matrix product with decays; between strips they travel by a scan, all in float64.
"""

import math

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, Strips, cut_into_strips
from .finite import any_seen, finite_part, is_finite
from .timestep_norm import NormState, empty_norm_state, moments_of_tokens, normalise, unless_empty

MEAN_DECAY = 0.999
VAR_DECAY = 0.9999
STRIP_SIZE = 64


@op()
def decay_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    boundaries: Boundaries | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, NormState]:
    """Normalise each token with decaying averages of its group's mean and variance, itself included.

    The averages start at zero with each document. For the n-th token of one they are divided by 1 - decay^n, so that
    its tokens alone count. The variance is that within tokens: how far their means lie apart is left out.

    Args:
        x: (B, L, D), L at least 1.
        weight: (D,), stored as an offset from 1.
        bias: (D,).
        num_groups: G, a divisor of D.
        eps: added to the variance.
        state: averages at the entry, not divided, or None for none.
        boundaries: documents restart from nothing; padding yields 0 and leaves the averages alone.
        out_dtype: type of y; that of x by default.

    Returns:
        y (B, L, D), and the averages at the exit, not divided.
    """
    batch, length, _ = x.shape
    entry = empty_norm_state(batch, num_groups, x.device) if state is None else state
    where = boundaries or Boundaries()
    since = where.since_start(torch.zeros(batch, dtype=torch.int64), length)  # tokens of the document in this piece
    count = (since + 1).to(x.device)
    continued = torch.ones(1, 1, dtype=torch.bool) if where.starts is None else where.starts.cumsum(1) == 0
    count = count + continued.to(x.device) * entry.count[:, None]  # (B, L)
    if where.lengths is not None:
        since = torch.where(where.valid(length), since, -1)

    groups, token_mean, token_var = moments_of_tokens(x, num_groups)
    moments = torch.cat([token_mean, token_var], -1).double()  # (B, L, 2 G)
    strips = cut_into_strips(batch, length, STRIP_SIZE, boundaries, x.device)
    before = torch.where((entry.count > 0)[:, None], torch.cat([entry.mean, entry.var], -1), 0)
    averages = _averages(moments, before, strips)
    if not is_finite(averages, since):
        wrong = any_seen(~torch.isfinite(moments), since)
        averages = _averages(finite_part(moments), before, strips).masked_fill(wrong, math.nan)

    mean, var = (averages.unflatten(-1, (2, -1)) / _mass(count)[..., None]).unbind(-2)
    statistics = torch.cat([mean, (var + eps).rsqrt()], -1).to(groups.dtype)
    y = normalise(groups, statistics, weight, bias, boundaries)

    rows = torch.arange(batch, device=x.device)
    last = length - 1 if where.lengths is None else (where.lengths - 1).clamp(min=0).to(x.device)
    leaving = NormState(count[rows, last], *averages[rows, last].chunk(2, -1))
    if where.lengths is not None:
        leaving = unless_empty(where.lengths, leaving, entry)
    return y.to(out_dtype or x.dtype), leaving


def _log_decays(device: torch.device) -> Tensor:
    """(2,): of the mean and of the variance."""
    return torch.tensor([math.log(MEAN_DECAY), math.log(VAR_DECAY)], dtype=torch.float64, device=device)


def _mass(count: Tensor) -> Tensor:
    """(..., 2): 1 - decay^n, what the weights of n tokens sum up to; exact to the last digits for few tokens too."""
    return -torch.expm1(count[..., None] * _log_decays(count.device))


def _averages(moments: Tensor, entry: Tensor, strips: Strips) -> Tensor:
    """Decaying averages after each token, (B, L, 2 G) as the moments; entry (B, 2 G)."""
    half = moments.shape[-1] // 2
    logs = _log_decays(moments.device)
    steps = torch.arange(strips.size + 1, device=moments.device)
    powers = (steps[:, None] * logs).exp()  # (T + 1, 2)
    lag = steps[:-1, None] - steps[:-1]  # (T, T): token minus source
    kernel = torch.where((lag >= 0)[..., None], powers[lag.clamp(min=0)] * -torch.expm1(logs), 0)
    taken = strips.gather(moments).unflatten(-1, (2, half))  # (M, T, 2, G)
    inside = torch.einsum("tsj,msjg->mtjg", kernel, taken).flatten(2)
    before = strips.carry(inside[:, -1], entry, powers[-1].repeat_interleave(half))
    return strips.scatter(inside + before[:, None] * powers[1:].repeat_interleave(half, 1))
