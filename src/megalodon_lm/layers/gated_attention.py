"""Moving average gated attention: the token-mixing half of a block."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import InputError
from ..ops.boundaries import Boundaries
from ..ops.derived import derived
from ..ops.gates import silu_gate
from ..ops.norms import head_maps, head_rms_norm
from ..ops.residual import add_branch
from ..state_spec import Tree, present
from .adaptive_memory import AdaptiveMemory
from .bidirectional_attention import BidirectionalAttention
from .chunk_attention import ChunkAttention
from .complex_ema import ComplexEMA
from .heads import split_heads
from .initialization import Initialiser
from .linear import Linear, linear_add, linear_silu, linears
from .norms import AffineNorm, RMSNorm
from .sliding_attention import SlidingAttention


class GatedAttention(nn.Module):
    """A norm, a moving average, attention with queries and keys from one normalised z, and a gate.

    tn = timenorm(x); mx = rmsnorm(cema(tn)); queries and keys from mx, values from tn, the gate from mx;
    y = x + wh1(mx) + wh2(attention * silu(wr(mx)) + memory). Parameter names are those of the authors' code.

    Heads are known by their widths: how many there are follows from the weights, so that a shard that holds the rows of
    some heads in wz, wv, wr, gamma, beta, and their columns in wh2, computes those.

    Its state is a dict of its parts' states: "norm", "cema", "attention" and "memory", of those that carry one.

    Args:
        timenorm: (x, entry state, boundaries) to the normalised x and the exit state.
        cema: as timenorm; None for no average.
        rmsnorm: of the average; or an activation in its place.
        attention: (q, k, v, entry cache, boundaries) to the attention and the exit cache.
        memory: (q, k, v, entry state, entry cache of the attention, boundaries) to what it recalls and the exit state,
            with queries and keys of its own; None for no memory.
        dim: D.
        z_dim, value_dim: Z and V, all heads together.
        z_head_dim, value_head_dim: of one head.
        eps: of the normalisation of queries and keys.
        normalized: whether there is one; otherwise queries and keys are made of z as it is.
        init: draws the initial matrices.
        hidden_dropout: on the averages and on the gated attention.
        dropout: on the branch.
    """

    def __init__(
        self,
        timenorm: AffineNorm,
        cema: ComplexEMA | None,
        rmsnorm: RMSNorm | nn.SiLU,
        attention: ChunkAttention | SlidingAttention | BidirectionalAttention,
        memory: AdaptiveMemory | None,
        *,
        dim: int,
        z_dim: int,
        value_dim: int,
        z_head_dim: int,
        value_head_dim: int,
        eps: float,
        normalized: bool,
        init: Initialiser,
        hidden_dropout: float,
        dropout: float,
    ):
        super().__init__()
        self.z_head_dim, self.value_head_dim, self.eps, self.normalized = z_head_dim, value_head_dim, eps, normalized
        self.hidden_dropout, self.dropout = hidden_dropout, dropout
        self.timenorm = timenorm
        self.cema = cema
        self.rmsnorm = rmsnorm
        self.attention = attention
        self.memory = memory
        self.wv = Linear(dim, value_dim, True, init)
        self.wz = Linear(dim, z_dim, True, init)
        self.wr = Linear(dim, value_dim, True, init)
        self.wh1 = Linear(dim, dim, True, init)
        self.wh2 = Linear(value_dim, dim, False, init)
        views = 2 if memory is None else 4  # of z: queries and keys of the attention, and of the memory
        self.gamma = nn.Parameter(torch.empty(views, z_dim))
        self.beta = nn.Parameter(torch.empty(views, z_dim))

    def init_weights(self) -> None:
        """Set the affine maps of queries and keys to the identity."""
        nn.init.zeros_(self.gamma)
        nn.init.zeros_(self.beta)

    @property
    def state_spec(self) -> dict[str, Tree]:
        """Of its parts."""
        sizes = len(self.wz.weight) // self.z_head_dim, self.z_head_dim, self.value_head_dim
        parts: dict[str, Any] = {
            "norm": self.timenorm.state_spec,
            "cema": None if self.cema is None else self.cema.state_spec,
            "attention": self.attention.state_spec(*sizes),
            "memory": None if self.memory is None else self.memory.state_spec(*sizes),
        }
        return present(parts)

    def forward(
        self, x: Tensor, state: dict[str, Tree] | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, dict[str, Tree]]:
        """x (B, L, D) to y (B, L, D), and the exit state."""
        entry, leaving = state or {}, {}
        tn, leaving["norm"] = self.timenorm(x, entry.get("norm"), boundaries)
        average = tn
        if self.cema is not None:
            average, leaving["cema"] = self.cema(tn, entry.get("cema"), boundaries)
        mx = self.rmsnorm(average)
        if self.training:
            mx = F.dropout(mx, self.hidden_dropout)

        z, r, skipping = linears(mx, self.wz, self.wr, self.wh1)
        z = split_heads(z, self.z_head_dim, "z")
        v = split_heads(linear_silu(tn, self.wv), self.value_head_dim, "values")
        held = (z.shape[-2], v.shape[-2], r.shape[-1] / self.value_head_dim)
        if len(set(held)) > 1:
            raise InputError("wz, wv and wr hold {}, {} and {:g} heads; shard them alike".format(*held))
        q, k, *of_memory = self._views(z)
        cache = entry.get("attention")
        attention, leaving["attention"] = self.attention(q, k, v, cache, boundaries)
        gated = silu_gate(r, attention.flatten(-2))
        if self.memory is not None:
            recalled, leaving["memory"] = self.memory(*of_memory, v, entry.get("memory"), cache, boundaries)
            gated = gated + recalled.flatten(-2)
        if self.training:
            gated = F.dropout(gated, self.hidden_dropout)
        leaving = present(leaving)
        if self.training and self.dropout:
            return add_branch(x, F.dropout(skipping + self.wh2(gated), self.dropout)), leaving
        return linear_add(gated, self.wh2, x, skipping), leaving

    def _views(self, z: Tensor) -> list[Tensor]:
        """z (B, L, H, Z/H), normalised per head, through each affine map: tensors of that shape."""
        maps = zip(*derived(head_maps, self.gamma, self.beta, arguments=(self.z_head_dim,)), strict=True)
        if self.normalized:
            return [head_rms_norm(z, scale, shift, self.eps) for scale, shift in maps]
        return [(z * scale + shift).to(z.dtype) for scale, shift in maps]
