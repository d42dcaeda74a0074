"""Normalised feed-forward network: the channel-mixing half of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import ModelConfig
from ..ops import backend
from .initialization import linear
from .norms import LayerNorm


class FeedForward(nn.Module):
    """fc2(silu(fc1(n)) * fc3(n)) with n = LayerNorm(y), or without the gate fc3, added to a residual from outside.

    The optional per-feature scale `alpha` (rescale_nffn) starts at 0.1 * 0.5^layer.
    """

    def __init__(self, config: ModelConfig, layer: int):
        super().__init__()
        self.config = config
        d, f, init = config.model_dim, config.ffn_hidden_dim, config.init_mode
        self.norm = LayerNorm(d, config.norm_eps)
        self.fc1 = linear(d, f, False, init)
        self.fc2 = linear(f, d, False, init)
        self.fc3 = linear(d, f, False, init) if config.swiglu else None
        self.alpha = nn.Parameter(torch.full((d,), 0.1 * 0.5**layer)) if config.rescale_nffn else None

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        """y, residual (B, L, D) to (B, L, D)."""
        n = self.norm(y)
        hidden = F.silu(self.fc1(n)) if self.fc3 is None else backend.silu_gate(self.fc1(n), self.fc3(n))
        out = self.fc2(F.dropout(hidden, self.config.hidden_dropout, self.training))
        out = F.dropout(out, self.config.dropout, self.training)
        return residual + (out if self.alpha is None else self.alpha * out)
