"""Gated products on the CPU, as an operator with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import gates as portable
from ..backend import implements
from . import elementwise_kernels as kernels
from .operators import form
from .simd import LANES
from .team import run_on_team

_TASK = 256 * LANES  # elements


def _fits(gate: Tensor, x: Tensor) -> bool:
    return gate.dtype == x.dtype and x.numel() % LANES == 0


@implements(portable.silu_gate, "cpu", _fits)
def silu_gate(gate: Tensor, x: Tensor) -> Tensor:
    """As megalodon_lm.ops.gates.silu_gate, for float32 or bf16."""
    return form(silu_gate_forward, _forward, gate, x)(gate.contiguous(), x.contiguous())


def _forward(gate: Tensor, x: Tensor) -> Tensor:
    y = x.new_empty(x.shape)
    run_on_team(kernels.gate_forward_on_team, -(-x.numel() // _TASK), _TASK, gate, x, y)
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
    run_on_team(kernels.gate_backward_on_team, -(-x.numel() // _TASK), _TASK, gate, x, grad_y, grad_gate, grad_x)
    return grad_gate, grad_x


@silu_gate_backward.register_fake
def _(gate: Tensor, x: Tensor, grad_y: Tensor) -> Any:
    return gate.new_empty(gate.shape), x.new_empty(x.shape)


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_y: Tensor) -> Any:
    return silu_gate_backward(*ctx.saved_tensors, grad_y.contiguous())


silu_gate_forward.register_autograd(_backward, setup_context=_save)
