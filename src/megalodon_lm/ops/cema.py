"""CEMA, the complex exponential moving average: a diagonal state space model per channel.

The portable path works in strips: inside one of T tokens the average is a Toeplitz matrix product, and only the
state at the entry of each strip travels. No tensor of size L x D x N, no FFT, no loop over tokens.
"""

import math

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, cut_into_strips
from .finite import any_seen, finite_part, is_finite

STRIP_SIZE = 64


def cema_coefficients(
    alpha: Tensor, delta: Tensor, theta: Tensor, gamma: Tensor, scaled: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients of the recurrence, in float32 or better whatever the parameters' type.

    Args:
        alpha, delta: (D, N, 1).
        theta: (D, 1, 1).
        gamma: (D, N, 2), real and imaginary parts.
        scaled: g is gamma / sqrt(N) (Megalodon's code), and not gamma itself (Gecko).

    Returns:
        p (D, N) real, q (D, N) complex with |q| < 1, g (D, N) complex.
    """
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    alpha, delta, theta, gamma = (t.to(dtype) for t in (alpha, delta, theta, gamma))
    ndim = alpha.shape[1]
    p = torch.sigmoid(alpha).squeeze(-1)
    wave = torch.arange(1, ndim + 1, dtype=dtype, device=alpha.device) * (2 * math.pi / ndim)
    phi = torch.sigmoid(theta).squeeze(-1) * wave
    q = torch.polar(1 - p * torch.sigmoid(delta).squeeze(-1), phi)
    g = torch.view_as_complex((gamma / math.sqrt(ndim) if scaled else gamma).contiguous())
    return p, q, g


def ema_coefficients(alpha: Tensor, delta: Tensor, gamma: Tensor, scaled: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Those of the average whose states do not turn (the EMA of MEGA): q and g have no imaginary part.

    Args:
        alpha, delta, gamma: (D, N, 1).
        scaled: as in cema_coefficients.
    """
    dtype = torch.promote_types(alpha.dtype, torch.float32)
    alpha, delta, gamma = (t.to(dtype).squeeze(-1) for t in (alpha, delta, gamma))
    p = torch.sigmoid(alpha)
    g = gamma / math.sqrt(gamma.shape[1]) if scaled else gamma
    q = 1 - p * torch.sigmoid(delta)
    return p, torch.complex(q, torch.zeros_like(q)), torch.complex(g, torch.zeros_like(g))


@op()
def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    g: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = q h_{t-1} + p x_t; y_t = Re(sum_n g_n h_{t,n}) + omega x_t.

    Args:
        x: (B, L, D).
        p: (D, N) real.
        q: (D, N) complex.
        g: (D, N) complex.
        omega: (D,).
        state: (B, D, N, 2) h at the entry as real pairs, or None for zero.
        boundaries: documents restart from zero; padding yields 0 and leaves h alone.

    Returns:
        y (B, L, D) in the type of x, and h at the exit (B, D, N, 2) in the precision of the coefficients.
    """
    y, leaving = _cema(x, p, q, g, omega, state, boundaries)
    since = (boundaries or Boundaries()).since_start(torch.zeros(len(x), dtype=torch.int64), x.shape[1])
    last = torch.full((len(x),), x.shape[1] - 1)
    if boundaries is not None and boundaries.lengths is not None:
        since = torch.where(boundaries.valid(x.shape[1]), since, -1)
        last = (boundaries.lengths - 1).clamp(min=0)
    if is_finite(y, since):
        return y, leaving
    y, leaving = _cema(finite_part(x), p, q, g, omega, state, boundaries)
    spoilt = any_seen(~torch.isfinite(x), since)
    at_exit = spoilt[torch.arange(len(x), device=x.device), last.to(x.device)]
    return y.masked_fill(spoilt, math.nan), leaving.masked_fill(at_exit[..., None, None], math.nan)


def _cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    g: Tensor,
    omega: Tensor,
    state: Tensor | None,
    boundaries: Boundaries | None,
) -> tuple[Tensor, Tensor]:
    """cema, but within a strip what is not finite may reach earlier tokens of its channel."""
    batch, length, dim = x.shape
    ndim = p.shape[1]
    strips = cut_into_strips(batch, length, STRIP_SIZE, boundaries, x.device)
    size = strips.size
    xs = x.to(p.dtype)

    powers = _powers(q, size)  # (T + 1, D, N): q^0 .. q^T
    kernel = (p * g * powers[:size]).sum(-1).real  # (T, D)
    lag = torch.arange(size, device=x.device)
    lag = lag[:, None] - lag  # (T, T): token minus source
    toeplitz = torch.where((lag >= 0)[..., None], kernel[lag.clamp(min=0)], 0).permute(2, 0, 1)
    absorb = _pairs(p * powers[:size].flip(0))  # (T, D, 2N): source to the state at the end of the strip
    emit = g * powers[1:]  # entry state to token t
    emit = torch.cat([emit.real, -emit.imag], -1).transpose(0, 1)  # (D, T, 2N)

    xb = strips.gather(xs).permute(2, 1, 0)  # (D, T, M)
    entry = None if state is None else _complex(torch.cat([state[..., 0], state[..., 1]], -1).to(p.dtype))
    last = strips.last.clamp(min=0)
    y = torch.bmm(toeplitz, xb)  # (D, T, M)
    if strips.longest > 1 or torch.compiler.is_compiling():
        totals = torch.bmm(absorb.permute(1, 2, 0), xb)  # (D, 2N, M)
        entries = strips.carry(_complex(totals.permute(2, 0, 1)), entry, powers[size])  # (M, D, N)
        y = y + torch.bmm(emit, _pairs(entries).permute(1, 2, 0))
        before_last = entries[last]
    else:  # no state goes from strip to strip, so none is held for each of them
        before_last = torch.zeros(batch, dim, ndim, dtype=q.dtype, device=x.device)
        if entry is not None and len(strips.row):
            (carried,) = strips.carries.nonzero(as_tuple=True)
            y = y.index_add(2, carried, torch.bmm(emit, _pairs(entry[strips.row[carried]]).permute(1, 2, 0)))
            before_last = torch.where(strips.carries[last].view(-1, 1, 1), entry, before_last)
    y = strips.scatter(y.permute(2, 1, 0)) + omega.to(p.dtype) * xs
    if boundaries is not None and boundaries.lengths is not None:
        y = torch.where(boundaries.valid(length)[..., None].to(x.device), y, 0)

    added = _complex(torch.einsum("tdn,btd->bdn", absorb, strips.tail(xs)))
    leaving = powers[strips.used] * before_last + added
    if (boundaries is not None) and (boundaries.lengths is not None):
        before = torch.zeros_like(leaving) if entry is None else entry
        leaving = torch.where((strips.last >= 0).view(-1, 1, 1), leaving, before)
    assert leaving.shape == (batch, dim, ndim)
    return y.to(x.dtype), torch.view_as_real(leaving)


def _powers(q: Tensor, highest: int) -> Tensor:
    """(highest + 1, D, N): q^0 .. q^highest by repeated doubling, without a logarithm that |q| = 0 would break."""
    powers = torch.stack([q * 0 + 1, q])  # NaN where q is
    while len(powers) <= highest:
        powers = torch.cat([powers, powers[1:] * powers[-1]])
    return powers[: highest + 1]


def _pairs(z: Tensor) -> Tensor:
    """(..., N) complex to (..., 2N) real: all real parts, then all imaginary ones."""
    return torch.cat([z.real, z.imag], -1)


def _complex(pairs: Tensor) -> Tensor:
    """The inverse of _pairs."""
    real, imag = pairs.chunk(2, -1)
    return torch.complex(real.contiguous(), imag.contiguous())
