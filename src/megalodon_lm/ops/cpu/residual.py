"""Adding branches to the residual stream on the CPU, in one pass, as an operator with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import residual as portable
from ..backend import implements
from . import elementwise_kernels as kernels
from .operators import form
from .simd import LANES
from .team import run_on_team

_TASK = 512 * LANES  # elements


def _fits(x: Tensor, branch: Tensor, other: Tensor | None = None) -> bool:
    added = (branch,) if other is None else (branch, other)
    alike = all(t.shape == x.shape and t.dtype == branch.dtype for t in added)
    return alike and branch.dtype in (x.dtype, torch.bfloat16) and x.numel() % LANES == 0


@implements(portable.add_branch, "cpu", _fits)
def add_branch(x: Tensor, branch: Tensor, other: Tensor | None = None) -> Tensor:
    """As megalodon_lm.ops.residual.add_branch, for x in float32, or all in bf16."""
    other = None if other is None else other.contiguous()
    return form(add_branch_forward, _forward, x, branch, other)(x.contiguous(), branch.contiguous(), other)


def _forward(x: Tensor, branch: Tensor, other: Tensor | None) -> Tensor:
    y, tasks = x.new_empty(x.shape), -(-x.numel() // _TASK)
    if other is None:
        run_on_team(kernels.add_one_on_team, tasks, _TASK, x, branch, y)
    else:
        run_on_team(kernels.add_two_on_team, tasks, _TASK, x, branch, other, y)
    return y


@torch.library.custom_op("megalodon::add_branch_forward", mutates_args=())
def add_branch_forward(x: Tensor, branch: Tensor, other: Tensor | None) -> Tensor:
    """_forward as an operator."""
    return _forward(x.detach(), branch.detach(), None if other is None else other.detach())


@add_branch_forward.register_fake
def _(x: Tensor, branch: Tensor, other: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    _, branch, other = inputs
    ctx.dtype, ctx.two = branch.dtype, other is not None


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    grad = grad_y.to(ctx.dtype)
    return grad_y, grad, grad if ctx.two else None


add_branch_forward.register_autograd(_backward, setup_context=_save)
