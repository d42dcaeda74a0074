"""A causal convolution of a few taps over each channel by itself, as in front of Mamba and linear attention.

A sum of shifted products, in the layout that every other layer has: by PyTorch on a CPU it takes a third of the time of
its grouped convolution.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .boundaries import Boundaries


@op()
def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    boundaries: Boundaries | None = None,
) -> tuple[Tensor, Tensor]:
    """y_t = bias + sum_j weight[:, j] x_{t - (K - 1) + j}: the last tap weighs the token itself.

    Args:
        x: (B, L, D), L at least 1.
        weight: (D, K).
        bias: (D,), or None.
        state: (B, K - 1, D), the inputs before the piece, the newest last; None for zeros.
        boundaries: documents begin with zeros before them; padding yields 0 and leaves the state alone.

    Returns:
        y (B, L, D) and the state at the exit, both in the type of x; sums are taken in float32 or better.
    """
    batch, length, dim = x.shape
    before = weight.shape[1] - 1
    entry = x.new_zeros(batch, before, dim) if state is None else state.to(x.dtype)
    if boundaries is None:
        window = torch.cat([entry, x], 1)
        return shifted_products(window, weight, bias, None), window[:, length:]

    lengths = torch.full((batch,), length) if boundaries.lengths is None else boundaries.lengths
    if boundaries.lengths is not None:
        valid = boundaries.valid(length)[..., None].to(x.device)
        x = torch.where(valid, x, 0)
    window, full = torch.cat([entry, x], 1), torch.full((batch,), before)
    seen = None
    if boundaries.starts is not None:
        seen = boundaries.since_start(full, length).clamp(max=before)
    y = shifted_products(window, weight, bias, seen)
    if boundaries.lengths is not None:
        y = torch.where(valid, y, 0)

    steps = torch.arange(before)
    leaving = window.gather(1, (lengths[:, None] + steps)[..., None].to(x.device).expand(-1, -1, dim))
    used = boundaries.exit_position(full, length)[:, None] >= before - steps
    return y, torch.where(used[..., None].to(x.device), leaving, 0)


@op()
def shifted_products(window: Tensor, weight: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    """The convolution of a window that begins with what is before the piece.

    Args:
        window: (B, K - 1 + L, D).
        weight: (D, K).
        bias: (D,), or None.
        seen: (B, L) int64 on the CPU, how many tokens before each one count, at most K - 1; None for all.

    Returns:
        (B, L, D) in the type of the window.
    """
    if seen is None:
        return _Convolution.apply(window, weight, bias, None)
    seen = seen.to(window.device)
    return _Convolution.apply(window, weight, bias, [seen[..., None] >= n for n in range(weight.shape[1] - 1, 0, -1)])


class _Convolution(torch.autograd.Function):
    """Shifted products of a window (B, K - 1 + L, D); `seen` has for each tap but the last where it counts (B, L, 1).

    By hand, because autograd would pad and add up a gradient of the whole window for each tap.
    """

    @staticmethod
    def forward(ctx: Any, window: Tensor, weight: Tensor, bias: Tensor | None, seen: list[Tensor] | None) -> Tensor:
        ctx.save_for_backward(window, weight, *(seen or []))
        ctx.biased = bias is not None
        wide, taps = _widened(window, weight)
        *earlier, (own, tap) = _shifted(wide, taps, seen)
        y = own * tap if bias is None else torch.addcmul(bias.to(tap.dtype), own, tap)
        for x, tap in earlier:
            y.addcmul_(x, tap)
        return y.to(window.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        window, weight, *seen = ctx.saved_tensors
        wide, taps = _widened(window, weight)
        grad, before = grads[0].to(wide.dtype), len(taps) - 1
        to_window = F.pad(grad * taps[-1], (0, 0, before, 0))
        for j, tap in enumerate(taps[:-1]):
            to_window[:, j : j + grad.shape[1]].addcmul_(torch.where(seen[j], grad, 0) if seen else grad, tap)
        to_weight = torch.stack([(x * grad).sum((0, 1)) for x, _ in _shifted(wide, taps, seen)], 1)
        to_bias = grad.sum((0, 1)) if ctx.biased else None
        return to_window.to(window.dtype), to_weight.to(weight.dtype), to_bias, None


def _widened(window: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The window and the taps (K, D), in float32 or better."""
    dtype = torch.promote_types(torch.promote_types(window.dtype, weight.dtype), torch.float32)
    return window.to(dtype), weight.t().to(dtype).contiguous()


def _shifted(window: Tensor, taps: Tensor, seen: list[Tensor] | None) -> list[tuple[Tensor, Tensor]]:
    """What each tap weighs (B, L, D), and the tap, the oldest first."""
    length = window.shape[1] - len(taps) + 1
    shifted = [window[:, j : j + length] for j in range(len(taps))]
    if seen:
        shifted = [torch.where(s, x, 0) for s, x in zip(seen, shifted, strict=False)] + shifted[-1:]
    return list(zip(shifted, taps, strict=True))
