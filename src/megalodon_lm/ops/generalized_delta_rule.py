"""The generalised delta rule with a decay for every channel: the recurrence of RWKV-7.

A head's matrix is multiplied, token by token, by a diagonal matrix plus one of rank 1, and takes one in of rank 1. In a
chunk of T tokens all of that folds into matrix products (the WY form of products of such matrices), and from chunk to
chunk goes S' = P S + Q alone. Source: Peng et al. 2025 (arXiv 2503.14456); Yang et al. 2024 (arXiv 2406.06484) for the
chunks.
"""

import torch
from torch import Tensor

from .backend import op
from .boundaries import Boundaries, Strips
from .chunked_recurrence import NOTHING, by_heads, carry, in_chunks

CHUNK_SIZE = 16  # decays over a chunk are divided by each other: with w >= 0.545, by no less than 6e-5


@op()
def generalized_delta_rule(
    r: Tensor,
    log_w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(w_t) S_{t-1} + b_t^T (a_t S_{t-1}) + k_t^T v_t; y_t = r_t S_t, for each head.

    Args:
        r, k, a, b: (B, L, H, K), L at least 1.
        log_w: (B, L, H, K), logarithm of the decay, at least -0.61 or so: see CHUNK_SIZE.
        v: (B, L, H, V).
        state: (B, H, K, V) S at the entry, or None for zero.
        boundaries: documents restart from zero; padding yields 0 and leaves S alone.

    Returns:
        y (B, L, H, V) in the type of r, and S at the exit (B, H, K, V) in float32 or better.
    """
    return in_chunks(lambda strips: _over_strips(r, log_w, k, v, a, b, state, strips), r, boundaries, CHUNK_SIZE)


def _over_strips(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, state: Tensor | None, strips: Strips
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(r.dtype, torch.float32)
    log_w = log_w.clamp(min=NOTHING)
    out, within, decay, added = _chunks(*(by_heads(t.to(wide), strips) for t in (r, log_w, k, v, a, b)))
    before, leaving = carry(decay, added, None if state is None else state.to(wide), strips, wide)
    return strips.scatter((out @ before + within).transpose(1, 2)).to(r.dtype), leaving


def _chunks(
    r: Tensor, log_w: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a chunk makes of the matrix S at its entry.

    Args:
        r, log_w, k, a, b: (M, H, T, K).
        v: (M, H, T, V).

    Returns:
        out (M, H, T, K) and within (M, H, T, V): y = out S + within. decay (M, H, K, K) and added (M, H, K, V): at the
        exit it is decay S + added.
    """
    size = k.shape[-2]
    logs = log_w.cumsum(-2)
    growth, end = (-logs).exp(), logs[..., -1:, :].exp()
    asking = torch.cat([a * (logs - log_w).exp(), r * logs.exp()], -2)  # of S, before each token and after it
    b, k = b * growth, k * growth
    products = asking @ torch.cat([b, k], -2).transpose(-1, -2)  # (M, H, 2 T, 2 T)
    ab, ak, rb, rk = (part for half in products.split(size, -2) for part in half.split(size, -1))
    ab, ak, rb, rk = ab.tril(-1), ak.tril(-1), rb.tril(), rk.tril()
    a, r = asking.split(size, -2)

    # u_t = a_t S_{t-1} depends on those before it: u = a S + ab u + ak v, and ab^T = 0.
    inverse, power, done = ab + torch.eye(size, dtype=ab.dtype, device=ab.device), ab, 1
    while (done := 2 * done) < size:
        power = power @ power
        inverse = inverse + inverse @ power
    u = inverse @ torch.cat([a, ak @ v], -1)
    of_matrix, own = (rb @ u).split([k.shape[-1], v.shape[-1]], -1)
    turn, gain = ((b * end).transpose(-1, -2) @ u).split([k.shape[-1], v.shape[-1]], -1)
    decay = turn + end.transpose(-1, -2) * torch.eye(k.shape[-1], dtype=k.dtype, device=k.device)
    return r + of_matrix, own + rk @ v, decay, gain + (k * end).transpose(-1, -2) @ v
