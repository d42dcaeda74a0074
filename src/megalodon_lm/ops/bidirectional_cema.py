"""Bidirectional moving average: one over what came before a step and itself, one over what comes after it.

The second is the first on the reversed sequence, a step late, so both run by one op and its kernels.
"""

import torch
from torch import Tensor

from .boundaries import Boundaries
from .cema import cema
from .padding import reverse

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
