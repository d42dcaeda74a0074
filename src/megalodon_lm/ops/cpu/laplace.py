"""The Laplace function on the CPU: one pass each way, of scores in the type of their products."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import laplace as portable
from ..backend import implements
from . import laplace_kernels as kernels
from .operators import form
from .simd import LANES
from .team import run_on_team

_STRETCH = 256 * LANES  # elements of a task
_SHIFT = np.float32(-portable.MEAN / portable.WIDTH)


def _fits(scores: Tensor, counts: Tensor, out_dtype: torch.dtype | None = None) -> bool:
    return scores.shape[1:].numel() >= LANES


@implements(portable.laplace, "cpu", _fits)
def laplace(scores: Tensor, counts: Tensor, out_dtype: torch.dtype | None = None) -> Tensor:
    """As megalodon_lm.ops.laplace.laplace, for 16 or more scores to a count."""
    factors = (1 / (portable.WIDTH * counts.double())).float()
    scores = scores.contiguous()
    return form(laplace_forward, _forward, scores)(scores, factors, out_dtype or scores.dtype)


def _tasks(scores: Tensor) -> tuple[int, tuple[Any, ...]]:
    """How many, and how they lie."""
    size = scores.shape[1:].numel()
    stretches = max(1, size // _STRETCH)
    return len(scores) * stretches, (size, stretches, _STRETCH, _SHIFT)


def _forward(scores: Tensor, factors: Tensor, out_dtype: torch.dtype) -> Tensor:
    y = scores.new_empty(scores.shape, dtype=out_dtype)
    number, lie = _tasks(scores)
    run_on_team(kernels.forward, number, *lie, factors, scores, y)
    return y


@torch.library.custom_op("megalodon::laplace_forward", mutates_args=())
def laplace_forward(scores: Tensor, factors: Tensor, out_dtype: torch.dtype) -> Tensor:
    """_forward as an operator."""
    return _forward(scores.detach(), factors, out_dtype)


@laplace_forward.register_fake
def _(scores: Tensor, factors: Tensor, out_dtype: torch.dtype) -> Tensor:
    return scores.new_empty(scores.shape, dtype=out_dtype)


@torch.library.custom_op("megalodon::laplace_backward", mutates_args=())
def laplace_backward(scores: Tensor, factors: Tensor, grad_y: Tensor) -> Tensor:
    """Gradient to the scores."""
    grad = scores.new_empty(scores.shape)
    number, lie = _tasks(scores)
    run_on_team(kernels.backward, number, *lie, factors, scores, grad_y, grad)
    return grad


@laplace_backward.register_fake
def _(scores: Tensor, factors: Tensor, grad_y: Tensor) -> Tensor:
    return scores.new_empty(scores.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    return laplace_backward(*ctx.saved_tensors, grad_y.contiguous()), None, None


laplace_forward.register_autograd(_backward, setup_context=_save)
