"""Moving average gated attention: the token-mixing half of a block."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops.boundaries import Boundaries
from ..ops.chunk_attention import KeyValueCache
from ..ops.gates import silu_gate
from ..ops.norms import head_rms_norm
from ..ops.residual import add_branch
from ..ops.timestep_norm import NormState
from .chunk_attention import ChunkAttention
from .complex_ema import ComplexEMA
from .initialization import Initialiser
from .linear import Linear
from .norms import RMSNorm, TimestepNorm


class GatedAttentionState(NamedTuple):
    """What it carries: running norm statistics, CEMA states (B, D, N, 2), and the unfinished chunk."""

    norm: NormState
    cema: Tensor
    attention: KeyValueCache


class GatedAttention(nn.Module):
    """TimestepNorm, CEMA, normalised chunk attention and its gate.

    tn = timenorm(x); mx = rmsnorm(cema(tn)); queries and keys from mx, values from tn, the gate from mx;
    y = x + wh1(mx) + wh2(attention * silu(wr(mx))). Parameter names are those of the authors' code.

    Heads are known by their widths: how many there are follows from the weights, so that a shard that holds the rows of
    some heads in wz, wv, wr, gamma, beta, and their columns in wh2, computes those.

    Args:
        timenorm, cema, rmsnorm, attention: the parts.
        dim: D.
        z_dim, value_dim: Z and V, all heads together.
        z_head_dim, value_head_dim: of one head.
        eps: of the normalisation of queries and keys.
        init: draws the initial matrices.
        hidden_dropout: on the averages and on the gated attention.
        dropout: on the branch.
    """

    def __init__(
        self,
        timenorm: TimestepNorm,
        cema: ComplexEMA,
        rmsnorm: RMSNorm,
        attention: ChunkAttention,
        *,
        dim: int,
        z_dim: int,
        value_dim: int,
        z_head_dim: int,
        value_head_dim: int,
        eps: float,
        init: Initialiser,
        hidden_dropout: float,
        dropout: float,
    ):
        super().__init__()
        self.z_head_dim, self.value_head_dim, self.eps = z_head_dim, value_head_dim, eps
        self.hidden_dropout, self.dropout = hidden_dropout, dropout
        self.timenorm = timenorm
        self.cema = cema
        self.rmsnorm = rmsnorm
        self.attention = attention
        self.wv = Linear(dim, value_dim, True, init)
        self.wz = Linear(dim, z_dim, True, init)
        self.wr = Linear(dim, value_dim, True, init)
        self.wh1 = Linear(dim, dim, True, init)
        self.wh2 = Linear(value_dim, dim, False, init)
        self.gamma = nn.Parameter(torch.empty(2, z_dim))
        self.beta = nn.Parameter(torch.empty(2, z_dim))

    def init_weights(self) -> None:
        """Set the affine maps of queries and keys to the identity."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    @property
    def state_spec(self) -> GatedAttentionState:
        """Of its parts."""
        heads = len(self.wz.weight) // self.z_head_dim
        cache = self.attention.state_spec(heads, self.z_head_dim, self.value_head_dim)
        return GatedAttentionState(self.timenorm.state_spec, self.cema.state_spec, cache)

    def forward(
        self, x: Tensor, state: GatedAttentionState | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, GatedAttentionState]:
        """x (B, L, D) to y (B, L, D), and the exit state."""
        norm_in, cema_in, cache_in = (None, None, None) if state is None else state
        tn, norm_out = self.timenorm(x, norm_in, boundaries)
        average, cema_out = self.cema(tn, cema_in, boundaries)
        mx = F.dropout(self.rmsnorm(average), self.hidden_dropout, self.training)

        z = _heads(self.wz(mx), self.z_head_dim, "z")
        v = _heads(F.silu(self.wv(tn)), self.value_head_dim, "values")
        r = self.wr(mx)
        held = (z.shape[-2], v.shape[-2], r.shape[-1] / self.value_head_dim)
        if len(set(held)) > 1:
            raise InputError("wz, wv and wr hold {}, {} and {:g} heads; shard them alike".format(*held))
        attention, cache_out = self.attention(*self._queries_and_keys(z), v, cache_in, boundaries)
        gated = silu_gate(r, attention.flatten(-2))
        gated = F.dropout(gated, self.hidden_dropout, self.training)
        state = GatedAttentionState(norm_out, cema_out, cache_out)
        if self.training and self.dropout:
            return add_branch(x, F.dropout(self.wh1(mx) + self.wh2(gated), self.dropout)), state
        return add_branch(x, self.wh1(mx), self.wh2(gated)), state

    def _queries_and_keys(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise z (B, L, H, Z/H) per head, with one affine map each: two tensors of that shape."""
        gamma = self.gamma.to(torch.promote_types(self.gamma.dtype, torch.float32))  # 1 + 0.003 would be 1 in bf16
        scales = ((gamma + 1) / math.sqrt(self.z_head_dim)).view(2, *z.shape[-2:])
        shifts = self.beta.view_as(scales)
        q, k = (head_rms_norm(z, *maps, self.eps) for maps in zip(scales, shifts, strict=True))
        return q, k


def _heads(x: Tensor, width: int, name: str) -> Tensor:
    """(..., H * width) to (..., H, width)."""
    if x.shape[-1] % width:
        raise InputError(f"{x.shape[-1]} features of {name} are no whole heads of width {width}; shard by whole heads")
    return x.unflatten(-1, (-1, width))
