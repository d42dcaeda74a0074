"""Bidirectional moving average: one over what came before a step and itself, one over what comes after it.

The second is the first on the reversed sequence, a step late, so both run by one op and its kernels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .boundaries import Boundaries, take
from .cema import cema

Coefficients = tuple[Tensor, Tensor, Tensor]
"""p (D, N) real, q and g (D, N) complex, as in ops.cema."""


def bidirectional_cema(
    x: Tensor, before: Coefficients, after: Coefficients, omega: Tensor, boundaries: Boundaries | None = None
) -> Tensor:
    """y_t = sum_{s<=t} k(t - s) x_s + sum_{s>t} k'(s - t - 1) x_s + omega x_t, with k(j) = Re(sum_n p_n g_n q_n^j).

    Args:
        x: (B, L, D).
        before, after: coefficients of the kernels k and k'.
        omega: (D,).
        boundaries: row lengths; padding yields 0 and leaves no trace. Documents are rows of their own here.

    Returns:
        (B, L, D), in the type of x.
    """
    assert boundaries is None or boundaries.starts is None
    lengths = None if boundaries is None else boundaries.lengths
    y, _ = cema(x, *before, omega, None, boundaries)
    late, _ = cema(reverse(x, lengths, late=1), *after, torch.zeros_like(omega), None, boundaries)
    return y + reverse(late, lengths)


def reverse(x: Tensor, lengths: Tensor | None, late: int = 0) -> Tensor:
    """(B, L, D) with the steps of each row in the opposite order, padding staying at its end, zero there.

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
