"""Normalisations. Every scale is stored as an offset from 1, so that weight decay pulls it to 1."""

from typing import ClassVar

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..ops.backend import Op
from ..ops.boundaries import Boundaries
from ..ops.decay_norm import decay_norm
from ..ops.norms import layer_norm, rms_norm
from ..ops.timestep_norm import NormState, timestep_norm
from ..state_spec import declare


class RMSNorm(nn.Module):
    """x / rms(x) * (weight + 1) over the last dimension."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        """Scale by 1."""
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class AffineNorm(nn.Module):
    """The parameters of a norm with scale and bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(dim))
        self.bias = nn.Parameter(torch.empty(dim))

    def init_weights(self) -> None:
        """Scale by 1, shift by 0."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)


class LayerNorm(AffineNorm):
    """(x - mean) / std * (weight + 1) + bias over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.weight, self.bias, self.eps)


class EntryLayerNorm(LayerNorm):
    """LayerNorm in the place of a norm over time: it looks at one token and carries nothing."""

    state_spec = None

    def forward(  # type: ignore[override]
        self, x: Tensor, state: None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, None]:
        return super().forward(x), None


class NormOverTime(AffineNorm):
    """Group normalisation with running statistics, in groups of `group_dim` features; subclasses say which."""

    op: ClassVar[Op]

    def __init__(self, dim: int, group_dim: int, eps: float):
        super().__init__(dim, eps)
        self.group_dim = group_dim

    @property
    def state_spec(self) -> NormState:
        """Running statistics."""
        groups = len(self.weight) // self.group_dim
        mean, var = (declare(groups, dtype=torch.float64) for _ in range(2))
        return NormState(declare(dtype=torch.int64), mean, var)

    def forward(
        self, x: Tensor, state: NormState | None = None, boundaries: Boundaries | None = None
    ) -> tuple[Tensor, NormState]:
        num_groups, rest = divmod(x.shape[-1], self.group_dim)
        if rest:
            raise InputError(f"{x.shape[-1]} features are no whole groups of {self.group_dim}; shard by whole groups")
        return self.op(x, self.weight, self.bias, num_groups, self.eps, state, boundaries)


class TimestepNorm(NormOverTime):
    """Statistics of everything up to a token; see ops.timestep_norm."""

    op = timestep_norm


class DecayNorm(NormOverTime):
    """Statistics that forget; see ops.decay_norm."""

    op = decay_norm
