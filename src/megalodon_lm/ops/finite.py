"""Keeping NaN and infinity to what depends on them.

Matrix products take many tokens at once, with zeros where one does not see another, and zero times NaN is NaN: it would
reach earlier tokens and other documents. So an op looks at its output, and if that is not finite it computes anew
without what was not finite in its input, and puts NaN where that belongs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def is_finite(out: Tensor, since: Tensor) -> bool:
    """Whether an op's output is finite where most is seen: at the last token of each run. A few rows tell of all.

    Args:
        out: (B, L, ...).
        since: (B, L) int64 on the CPU, how many tokens before it a token sees; -1 at padding.

    Returns:
        False also for a sum that overflows, True also inside a compiled graph, where nobody looks.
    """
    if torch.compiler.is_compiling():
        return True
    last = (since >= 0) & (F.pad(since[:, 1:], (0, 1), value=-1) != since + 1)
    rows, at = (i.to(out.device) for i in last.nonzero(as_tuple=True))
    return bool(torch.isfinite(out.detach()[rows, at].sum(dtype=torch.promote_types(out.dtype, torch.float32))))


def finite_part(x: Tensor) -> Tensor:
    """x with zeros for what is not finite."""
    return torch.where(torch.isfinite(x), x, 0)


def any_seen(wrong: Tensor, since: Tensor) -> Tensor:
    """Whether a token, or one of those it sees, is wrong.

    Args:
        wrong: (B, L, ...) bool.
        since: (B, L) int64, how many tokens before it a token sees, at most those of the piece; -1 at padding.

    Returns:
        (B, L, ...) bool, False at padding.
    """
    counts = wrong.cumsum(1)
    before = torch.arange(wrong.shape[1], device=wrong.device) - since.to(wrong.device) - 1
    shape = (*before.shape, *(1,) * (wrong.dim() - 2))
    earlier = counts.gather(1, before.clamp(min=0).view(shape).expand_as(counts))
    return counts > torch.where((before >= 0).view(shape), earlier, 0)
