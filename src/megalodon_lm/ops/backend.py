"""Which implementation of each op runs: the native CPU kernels where they apply, portable PyTorch elsewhere."""

import os
from typing import Literal, get_args

import torch
from torch import Tensor

from ..errors import InputError
from . import cema as _cema
from . import chunk_attention as _chunk_attention
from . import gates as _gates
from . import norms as _norms
from . import timestep_norm as _timestep_norm
from .boundaries import Boundaries
from .chunk_attention import KeyValueCache
from .timestep_norm import NormState

Backend = Literal["auto", "portable"]

_chosen: Backend = "auto"


def set_backend(name: Backend) -> None:
    """Choose for the whole process: "auto" takes native kernels where they apply, "portable" never.

    The environment variable MEGALODON_BACKEND sets the initial choice.

    Raises:
        InputError: unknown name.
    """
    global _chosen
    if name not in get_args(Backend):
        raise InputError(f"backend {name!r} must be one of {', '.join(get_args(Backend))}")
    _chosen = name


set_backend(os.environ.get("MEGALODON_BACKEND", "auto"))  # type: ignore[arg-type]


def compute_dtype(x: Tensor) -> torch.dtype:
    """Type in which matrix products take x: that of autocast, if it is on, else that of x."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def runs_natively(x: Tensor) -> bool:
    """Whether native kernels take tensors of this device and type, by the present choice."""
    return _chosen == "auto" and x.device.type == "cpu" and x.dtype in (torch.float32, torch.bfloat16)


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
        if runs_natively(x) and p.dtype == torch.float32:
            from .cpu import cema as native

            return native.cema(x, p, q, g, omega, state, boundaries)
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
    out_dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if runs_natively(x):
            from .cpu import timestep_norm as native

            return native.timestep_norm(x, weight, bias, num_groups, eps, state, boundaries, out_dtype)
        return _timestep_norm.timestep_norm(x, weight, bias, num_groups, eps, state, boundaries, out_dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See megalodon_lm.ops.norms.rms_norm."""
    out_dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if runs_natively(x):
            from .cpu import norms as native

            if native.fits(x):
                return native.rms_norm(x, weight, eps, out_dtype)
        return _norms.rms_norm(x, weight, eps, out_dtype)


def head_rms_norm(z: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """See megalodon_lm.ops.norms.head_rms_norm."""
    with torch.autocast(z.device.type, enabled=False):
        if runs_natively(z):
            from .cpu import norms as native

            if native.fits(z):
                return native.head_rms_norm(z, scale, shift, eps)
        return _norms.head_rms_norm(z, scale, shift, eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """See megalodon_lm.ops.norms.layer_norm."""
    out_dtype = compute_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        if runs_natively(x):
            from .cpu import norms as native

            if native.fits(x):
                return native.layer_norm(x, weight, bias, eps, out_dtype)
        return _norms.layer_norm(x, weight, bias, eps, out_dtype)


def silu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """See megalodon_lm.ops.gates.silu_gate."""
    if runs_natively(x) and gate.dtype == x.dtype:
        from .cpu import gates as native

        if native.fits(x):
            return native.silu_gate(gate, x)
    return _gates.silu_gate(gate, x)


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
    if runs_natively(q):
        from .cpu import chunk_attention as native

        return native.chunk_attention(q, k, v, chunk_size, rope_base, cache, boundaries, dropout, drop_keys)
    return _chunk_attention.chunk_attention(q, k, v, chunk_size, rope_base, cache, boundaries, dropout, drop_keys)


def describe(device: torch.device) -> str:
    """One line for reports: the implementation in use on a device."""
    if _chosen == "auto" and device.type == "cpu":
        return f"native CPU kernels on {torch.get_num_threads()} threads"
    return f"portable PyTorch on {device}"
