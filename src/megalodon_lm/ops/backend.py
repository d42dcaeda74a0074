"""Which implementation of each op runs: the native CPU kernels where they apply, portable PyTorch elsewhere."""

import torch
from torch import Tensor

from . import cema as _cema
from . import chunk_attention as _chunk_attention
from . import timestep_norm as _timestep_norm
from .boundaries import Boundaries
from .chunk_attention import KeyValueCache
from .timestep_norm import NormState


def cema(
    x: Tensor,
    p: Tensor,
    q: Tensor,
    g: Tensor,
    omega: Tensor,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """See megalodon_lm.ops.cema.cema."""
    with torch.autocast(x.device.type, enabled=False):  # coefficients and states stay float32 or better
        return _cema.cema(x, p, q, g, omega, state, boundaries)


def timestep_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, NormState]:
    """See megalodon_lm.ops.timestep_norm.timestep_norm."""
    with torch.autocast(x.device.type, enabled=False):
        return _timestep_norm.timestep_norm(x, weight, bias, num_groups, eps, state, boundaries)


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
    """See megalodon_lm.ops.chunk_attention.chunk_attention."""
    return _chunk_attention.chunk_attention(q, k, v, chunk_size, rope_base, cache, boundaries, dropout, drop_keys)


def describe(device: torch.device) -> str:
    """One line for reports: the implementation in use on a device."""
    return f"portable PyTorch on {device}"
