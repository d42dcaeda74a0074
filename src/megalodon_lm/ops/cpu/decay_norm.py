"""The decaying norm on the CPU: the kernels of TimestepNorm with other rates."""

import torch
from torch import Tensor

from .. import decay_norm as portable
from ..backend import implements
from ..boundaries import Boundaries
from ..timestep_norm import NormState
from .timestep_norm import norm_over_time

DECAYS = (portable.MEAN_DECAY, portable.VAR_DECAY)
"""For `timestep_norm_kernels.forward_on_team`, which also takes single tokens in place of TimestepNorm's."""


@implements(portable.decay_norm, "cpu")
def decay_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    eps: float = 1e-5,
    state: NormState | None = None,
    boundaries: Boundaries | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, NormState]:
    """As megalodon_lm.ops.decay_norm.decay_norm, for x in float32 or bf16."""
    return norm_over_time(DECAYS, x, weight, bias, num_groups, eps, state, boundaries, out_dtype)
