"""SiLU, and products that it gates, on the CPU, as operators with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import gates as portable
from ..backend import implements
from . import elementwise_kernels as kernels
from .elementwise_kernels import TASK
from .operators import form
from .simd import LANES
from .team import run_on_team


@implements(portable.silu, "cpu", lambda x: x.numel() % LANES == 0)
def silu(x: Tensor) -> Tensor:
    """As megalodon_lm.ops.gates.silu, for float32 or bf16."""
    return form(silu_forward, _silu, x)(x.contiguous())


def _silu(x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    run_on_team(kernels.silu_forward_on_team, -(-x.numel() // TASK), TASK, x, y)
    return y


@torch.library.custom_op("megalodon::silu_forward", mutates_args=())
def silu_forward(x: Tensor) -> Tensor:
    """_silu as an operator."""
    return _silu(x.detach())


@torch.library.custom_op("megalodon::silu_backward", mutates_args=())
def silu_backward(x: Tensor, grad_y: Tensor) -> Tensor:
    """Gradient to x."""
    grad_x = x.new_empty(x.shape)
    run_on_team(kernels.silu_backward_on_team, -(-x.numel() // TASK), TASK, x, grad_y, grad_x)
    return grad_x


@silu_forward.register_fake
@silu_backward.register_fake
def _(x: Tensor, *_: Tensor) -> Tensor:
    return x.new_empty(x.shape)


def _fits(gate: Tensor, x: Tensor) -> bool:
    return gate.dtype == x.dtype and x.numel() % LANES == 0


@implements(portable.silu_gate, "cpu", _fits)
def silu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """As megalodon_lm.ops.gates.silu_gate, for float32 or bf16."""
    return form(silu_gate_forward, _forward, gate, x)(gate.contiguous(), x.contiguous())


def _forward(gate: Tensor, x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    run_on_team(kernels.gate_forward_on_team, -(-x.numel() // TASK), TASK, gate, x, y)
    return y


@torch.library.custom_op("megalodon::silu_gate_forward", mutates_args=())
def silu_gate_forward(gate: Tensor, x: Tensor) -> Tensor:
    """_forward as an operator."""
    return _forward(gate.detach(), x.detach())


@silu_gate_forward.register_fake
def _(gate: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("megalodon::silu_gate_backward", mutates_args=())
def silu_gate_backward(gate: Tensor, x: Tensor, grad_y: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients to gate and x."""
    grad_gate, grad_x = gate.new_empty(gate.shape), x.new_empty(x.shape)
    run_on_team(kernels.gate_backward_on_team, -(-x.numel() // TASK), TASK, gate, x, grad_y, grad_gate, grad_x)
    return grad_gate, grad_x


@silu_gate_backward.register_fake
def _(gate: Tensor, x: Tensor, grad_y: Tensor) -> Any:
    return gate.new_empty(gate.shape), x.new_empty(x.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    return silu_gate_backward(*ctx.saved_tensors, grad_y.contiguous())


silu_gate_forward.register_autograd(_backward, setup_context=_save)
silu_forward.register_autograd(
    lambda ctx, grad_y: silu_backward(*ctx.saved_tensors, grad_y.contiguous()), setup_context=_save
)
