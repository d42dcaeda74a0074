"""Normalisations. Every scale is stored as an offset from 1, so that weight decay pulls it to 1."""

import torch
from torch import Tensor, nn

from ..ops import backend
from ..ops.boundaries import Boundaries
from ..ops.timestep_norm import NormState


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + 1) over the last dimension."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return backend.rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean) / std * (weight + 1) + bias over the last dimension."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        return backend.layer_norm(x, self.weight, self.bias, self.eps)


class TimestepNorm(nn.Module):
    """Cumulative group normalisation over time; see ops.timestep_norm."""

    def __init__(self, dim: int, num_groups: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = num_groups, eps
        self.weight = nn.Parameter(torch.zeros(dim))
        self.bias = nn.Parameter(torch.zeros(dim))

    def forward(
        self, x: Tensor, state: NormState | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, NormState]:
        return backend.timestep_norm(x, self.weight, self.bias, self.num_groups, self.eps, state, boundaries)
