"""A whole block of Megalodon, reading: without gradients, documents and dropout, from what its modules hold."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backend import op
from .cema import cema, cema_coefficients
from .chunk_attention import chunk_attention
from .derived import derived
from .gates import silu_gate
from .linear import Layer, linear_add, linear_gate, linear_silu, linears
from .norms import head_maps, head_rms_norm, layer_norm, rms_norm
from .timestep_norm import timestep_norm

Affine = tuple[Tensor, Tensor]


class BlockWeights(NamedTuple):
    """Parameters of a block, named as its modules."""

    timenorm: Affine
    cema: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    """alpha, delta, theta, gamma, omega."""
    rmsnorm: Tensor
    heads: Affine
    """gamma and beta, (2, Z): the maps from normalised z to queries and to keys."""
    wv: Layer
    wz: Layer
    wr: Layer
    wh1: Layer
    wh2: Layer
    norm: Affine
    fc1: Layer
    fc2: Layer
    fc3: Layer | None
    """None where there is no gate."""


class BlockSizes(NamedTuple):
    """What else a block is told by."""

    num_groups: int
    z_head_dim: int
    value_head_dim: int
    chunk_size: int
    rope_base: float
    heads_without_rope: int
    eps: float
    """Of all norms."""
    two_hop: bool
    """Whether the feed-forward network adds to the input of the block, and not to its own."""


@op()
def read_block(
    x: Tensor,
    weights: BlockWeights,
    sizes: BlockSizes,
    state: dict[str, Any] | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, dict[str, Any]]:
    """A norm over time, CEMA, gated chunk attention, and the feed-forward network, each added to the stream.

    Args:
        x: (B, L, D), the residual stream, L at least 1.
        weights: of the block; those of products are rounded once.
        sizes: of the block.
        state: at the entry: "norm", "cema" and "attention", as the ops of these take them; None for nothing.
        out_dtype: of what goes into products; that of x by default.

    Returns:
        (B, L, D), and the state at the exit.
    """
    w, s = weights, sizes
    y, leaving = _mix(x, w, s, state or {}, out_dtype)
    n = layer_norm(y, *w.norm, s.eps, out_dtype=out_dtype)
    hidden = linear_silu(n, w.fc1) if w.fc3 is None else linear_gate(n, w.fc1, w.fc3)
    return linear_add(hidden, w.fc2, x if s.two_hop else y), leaving


def _mix(
    x: Tensor, w: BlockWeights, s: BlockSizes, entry: dict[str, Any], out_dtype: torch.dtype | None
) -> tuple[Tensor, dict[str, Any]]:
    """What stands before the feed-forward network; what it made on the way is let go of here."""
    leaving: dict[str, Any] = {}
    tn, leaving["norm"] = timestep_norm(x, *w.timenorm, s.num_groups, s.eps, entry.get("norm"), out_dtype=out_dtype)
    *parameters, omega = w.cema
    coefficients = derived(cema_coefficients, *parameters, arguments=(True,))
    average, leaving["cema"] = cema(tn, *coefficients, omega.flatten(), entry.get("cema"))
    mx = rms_norm(average, w.rmsnorm, s.eps)

    z, r, skipping = linears(mx, (w.wz, w.wr, w.wh1))
    z, v = z.unflatten(-1, (-1, s.z_head_dim)), linear_silu(tn, w.wv).unflatten(-1, (-1, s.value_head_dim))
    maps = derived(head_maps, *w.heads, arguments=(s.z_head_dim,))
    q, k = (head_rms_norm(z, scale, shift, s.eps) for scale, shift in zip(*maps, strict=True))
    places = (s.chunk_size, s.rope_base, entry.get("attention"))
    attention, leaving["attention"] = chunk_attention(q, k, v, *places, heads_without_rope=s.heads_without_rope)
    return linear_add(silu_gate(r, attention.flatten(-2)), w.wh2, x, skipping), leaving
