"""Normalised feed-forward network: the channel-mixing half of a block."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.residual import add_branch
from .initialization import Initialiser
from .linear import Linear, linear_add, linear_gate, linear_silu
from .norms import LayerNorm, RMSNorm


class FeedForward(nn.Module):
    """fc2(silu(fc1(n)) * fc3(n)) with n = norm(y), or without the gate fc3, added to a residual from outside.

    Args:
        norm: of the input.
        dim: D.
        hidden_dim: F.
        gated: whether there is fc3.
        scale: where the trainable per-feature scale `alpha` of the branch starts; None for no such scale.
        init: draws the initial matrices.
        hidden_dropout: on the hidden features.
        dropout: on the branch.
        bias: whether the maps have one (MEGA).
    """

    def __init__(
        self,
        norm: LayerNorm | RMSNorm,
        dim: int,
        hidden_dim: int,
        gated: bool,
        scale: float | None,
        init: Initialiser,
        hidden_dropout: float,
        dropout: float,
        bias: bool = False,
    ):
        super().__init__()
        self.hidden_dropout, self.dropout, self.scale = hidden_dropout, dropout, scale
        self.norm = norm
        self.fc1 = Linear(dim, hidden_dim, bias, init)
        self.fc2 = Linear(hidden_dim, dim, bias, init)
        self.fc3 = Linear(dim, hidden_dim, bias, init) if gated else None
        self.alpha = None if scale is None else nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        """Set the scale of the branch."""
        if self.alpha is not None and self.scale is not None:
            nn.init.constant_(self.alpha, self.scale)

    def forward(self, y: Tensor, residual: Tensor) -> Tensor:
        """y, residual (B, L, D) to (B, L, D)."""
        n = self.norm(y)
        hidden = linear_silu(n, self.fc1) if self.fc3 is None else linear_gate(n, self.fc1, self.fc3)
        if self.training:
            hidden = F.dropout(hidden, self.hidden_dropout)
        if self.alpha is None and not (self.training and self.dropout):
            return linear_add(hidden, self.fc2, residual)
        out = F.dropout(self.fc2(hidden), self.dropout, self.training)
        return add_branch(residual, out if self.alpha is None else self.alpha * out)
