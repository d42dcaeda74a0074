"""Attention behind short convolutions: the token-mixing half of a block in Gecko's later variant."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.boundaries import Boundaries
from ..ops.gates import silu
from ..ops.norms import head_rms_norm
from ..ops.residual import add_branch
from ..state_spec import Tree, present
from .adaptive_memory import AdaptiveMemory
from .chunk_attention import ChunkAttention
from .heads import split_heads
from .initialization import Initialiser
from .linear import Linear
from .norms import AffineNorm
from .short_convolution import ShortConvolution
from .sliding_attention import SlidingAttention


class ConvolutionalAttention(nn.Module):
    """A norm, queries, keys and values through a short convolution each, attention, and a gate on all that is recalled.

    u = timenorm(x); q = convolution(wq(u)), k likewise, v = silu(convolution(wv(u)));
    y = x + wo(norm(attention(norm(q), norm(k), v) + memory(q, k, v)) * log2(1 + 2^wr(u))), norms per head.

    Source: the released code of a later Gecko (github.com/ifm-ai/xllm, gekko). Heads are known by their widths, as in
    GatedAttention. Its state is a dict: "norm", "convolution", "attention" and "memory", of those parts that carry one.

    Args:
        timenorm, attention, memory: as in GatedAttention.
        dim: D.
        num_taps: tokens that a convolution takes a mean of.
        z_dim, value_dim: Z and V, all heads together.
        z_head_dim, value_head_dim: of one head.
        eps: of the norms per head.
        normalized: whether queries and keys of the attention are divided by their root mean square.
        init: draws the initial matrices.
        hidden_dropout: on the gated heads.
        dropout: on the branch.
    """

    def __init__(
        self,
        timenorm: AffineNorm,
        attention: ChunkAttention | SlidingAttention,
        memory: AdaptiveMemory | None,
        *,
        dim: int,
        num_taps: int,
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
        self.attention = attention
        self.memory = memory
        self.wq = Linear(dim, z_dim, False, init)
        self.wk = Linear(dim, z_dim, False, init)
        self.wv = Linear(dim, value_dim, True, init)
        self.wr = Linear(dim, value_dim, False, init)
        self.wo = Linear(value_dim, dim, False, init)
        widths = {"q": z_dim, "k": z_dim, "v": value_dim}
        self.convolutions = nn.ModuleDict({name: ShortConvolution(width, num_taps) for name, width in widths.items()})
        self.gamma = nn.Parameter(torch.empty(1, z_dim))  # of the queries; keys have none

    def init_weights(self) -> None:
        """Scale queries by 1."""
        nn.init.zeros_(self.gamma)

    @property
    def state_spec(self) -> dict[str, Tree]:
        """Of its parts."""
        sizes = len(self.wq.weight) // self.z_head_dim, self.z_head_dim, self.value_head_dim
        parts: dict[str, Any] = {
            "norm": self.timenorm.state_spec,
            "convolution": {name: part.state_spec for name, part in self.convolutions.items()},
            "attention": self.attention.state_spec(*sizes),
            "memory": None if self.memory is None else self.memory.state_spec(*sizes),
        }
        return present(parts)

    def forward(
        self, x: Tensor, state: dict[str, Tree] | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, dict[str, Tree]]:
        """x (B, L, D) to y (B, L, D), and the exit state."""
        entry, leaving = state or {}, {}
        u, leaving["norm"] = self.timenorm(x, entry.get("norm"), boundaries)
        before, after, made = entry.get("convolution", {}), {}, {}
        for name, linear in (("q", self.wq), ("k", self.wk), ("v", self.wv)):
            made[name], after[name] = self.convolutions[name](linear(u), before.get(name), boundaries)
        leaving["convolution"] = after
        q, k = (split_heads(made[name], self.z_head_dim, name) for name in "qk")
        v = split_heads(silu(made["v"]), self.value_head_dim, "v")

        cache = entry.get("attention")
        near_q, near_k = self._of_attention(q, k)
        heads, leaving["attention"] = self.attention(near_q, near_k, v, cache, boundaries)
        if self.memory is not None:
            recalled, leaving["memory"] = self.memory(q, k, v, entry.get("memory"), cache, boundaries)
            heads = heads + recalled
        scale = torch.ones(heads.shape[-2:], device=x.device)
        heads = head_rms_norm(heads, scale, torch.zeros_like(scale), self.eps).flatten(-2)
        gate = F.softplus(self.wr(u), beta=math.log(2), threshold=40)  # log2(1 + 2^x)
        branch = self.wo(F.dropout(gate * heads, self.hidden_dropout, self.training))
        return add_branch(x, F.dropout(branch, self.dropout, self.training)), present(leaving)

    def _of_attention(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q, k (B, L, H, Z/H), normalised per head, the queries scaled for a softmax with scale 1."""
        gamma = self.gamma.to(torch.promote_types(self.gamma.dtype, torch.float32))
        scale = ((gamma + 1) / math.sqrt(self.z_head_dim)).view(q.shape[-2:])
        if not self.normalized:
            return (q * scale).to(q.dtype), k
        one, none = torch.ones_like(scale), torch.zeros_like(scale)
        return head_rms_norm(q, scale, none, self.eps), head_rms_norm(k, one, none, self.eps)
