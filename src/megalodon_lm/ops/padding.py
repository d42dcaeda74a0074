"""Padding at the ends of rows: zeros in its place, and what is before it in the opposite order."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .boundaries import take


@op()
def zero_padding(x: Tensor, lengths: Tensor) -> Tensor:
    """x with zeros from the end of each row on, whatever was there.

    Args:
        x: (B, L, ...).
        lengths: (B,) int64 on the CPU, steps of each row.
    """
    valid = (torch.arange(x.shape[1]) < lengths[:, None]).to(x.device)
    return torch.where(valid.view(*valid.shape, *(1,) * (x.dim() - 2)), x, 0)


@op()
def reverse(x: Tensor, lengths: Tensor | None, late: int = 0) -> Tensor:
    """The steps of each row in the opposite order, padding staying at its end, zero there.

    Args:
        x: (B, L, D).
        lengths: (B,) int64 on the CPU, None where no row is padded.
        late: so many steps later, zeros before; what would leave the row is lost.
    """
    batch, length = x.shape[:2]
    if lengths is None:
        return F.pad(x[:, late:].flip(1), (0, 0, late, 0))
    steps = torch.arange(length)
    source = lengths[:, None] - 1 - steps + late
    valid = (source >= 0) & (steps >= late) & (steps < lengths[:, None])
    index = torch.where(valid, torch.arange(batch)[:, None] * length + source, -1)
    return take(x.flatten(0, 1), index.to(x.device))
