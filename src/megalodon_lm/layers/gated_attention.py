"""Moving average gated attention: the token-mixing half of a block."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops import backend
from ..ops.boundaries import Boundaries
from ..state import LayerState
from .complex_ema import ComplexEMA
from .initialization import linear
from .norms import RMSNorm, TimestepNorm


class GatedAttention(nn.Module):
    """TimestepNorm, CEMA, normalised chunk attention and its gate.

    tn = TimestepNorm(x); mx = RMSNorm(CEMA(tn)); queries and keys from mx, values from tn, the gate from mx;
    y = x + wh1(mx) + wh2(attention * silu(wr(mx))). Parameter names are those of the authors' code.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        d, z, v, init = config.model_dim, config.z_dim, config.value_dim, config.init_mode
        self.timenorm = TimestepNorm(d, config.norm_num_groups, config.norm_eps)
        self.cema = ComplexEMA(d, config.cema_ndim)
        self.rmsnorm = RMSNorm(d, config.norm_eps)
        self.wv = linear(d, v, True, init)
        self.wz = linear(d, z, True, init)
        self.wr = linear(d, v, True, init)
        self.wh1 = linear(d, d, True, init)
        self.wh2 = linear(v, d, False, init)
        self.gamma = nn.Parameter(torch.zeros(2, z))
        self.beta = nn.Parameter(torch.zeros(2, z))

    def forward(
        self, x: Tensor, state: LayerState | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, LayerState]:
        """x (B, L, D) to y (B, L, D), and the layer's exit state."""
        c = self.config
        norm_in, cema_in, cache_in = (None, None, None) if state is None else state
        tn, norm_out = self.timenorm(x, norm_in, boundaries)
        average, cema_out = self.cema(tn, cema_in, boundaries)
        mx = F.dropout(self.rmsnorm(average), c.hidden_dropout, self.training)

        q, k = self._queries_and_keys(self.wz(mx))
        v = F.silu(self.wv(tn)).unflatten(-1, (c.num_heads, -1))
        dropout = c.attention_dropout if self.training else 0.0
        attention, cache_out = backend.chunk_attention(
            q, k, v, c.chunk_size, c.rope_base, cache_in, boundaries, dropout, c.drop_keys
        )
        gated = backend.silu_gate(self.wr(mx), attention.flatten(-2))
        gated = F.dropout(gated, c.hidden_dropout, self.training)
        h = self.wh1(mx) + self.wh2(gated)
        return x + F.dropout(h, c.dropout, self.training), LayerState(norm_out, cema_out, cache_out)

    def _queries_and_keys(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Normalise z (B, L, Z) per head, with one affine map each: two tensors (B, L, H, Z/H)."""
        heads = z.unflatten(-1, (self.config.num_heads, -1))
        gamma = self.gamma.to(torch.promote_types(self.gamma.dtype, torch.float32))  # 1 + 0.003 would be 1 in bf16
        scales = ((gamma + 1) / math.sqrt(heads.shape[-1])).view(2, *heads.shape[-2:])
        shifts = self.beta.view_as(scales)
        eps = self.config.norm_eps
        q, k = (backend.head_rms_norm(heads, *maps, eps) for maps in zip(scales, shifts, strict=True))
        return q, k
