"""RMS norm and layer norm on the CPU, as one operator with fake and autograd."""

from typing import Any

import torch
from torch import Tensor

from .. import norms as portable
from ..backend import implements
from ..derived import derived
from . import elementwise_kernels as kernels
from .operators import form
from .simd import LANES
from .team import run_on_team

SUMMED_TOKENS = 64  # tokens whose gradients to the weights are summed together, whatever the number of threads


def _fits(x: Tensor, *_: Any, **__: Any) -> bool:
    return x.shape[-1] % LANES == 0


@implements(portable.rms_norm, "cpu", _fits)
def rms_norm(x: Tensor, weight: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """As megalodon_lm.ops.norms.rms_norm, for x in float32 or bf16."""
    return _norm(x, *derived(scale_alone, weight), False, eps, out_dtype)


@implements(portable.head_rms_norm, "cpu", _fits)
def head_rms_norm(z: Tensor, scale: Tensor, shift: Tensor, eps: float) -> Tensor:
    """As megalodon_lm.ops.norms.head_rms_norm, for z in float32 or bf16."""
    maps = scale.float().contiguous(), shift.float().clone(memory_format=torch.contiguous_format)
    return _norm(z, *maps, False, eps, z.dtype)


@implements(portable.layer_norm, "cpu", _fits)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, out_dtype: torch.dtype | None = None) -> Tensor:
    """As megalodon_lm.ops.norms.layer_norm, for x in float32 or bf16."""
    return _norm(x, *derived(affine, weight, bias), True, eps, out_dtype)


def affine(weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """What a norm multiplies by and adds, contiguous float32, in memory of their own: see simd.as_numpy."""
    return (weight.float() + 1).contiguous(), bias.float().clone(memory_format=torch.contiguous_format)


def scale_alone(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`affine` without a bias."""
    scale = (weight.float() + 1).contiguous()
    return scale, torch.zeros_like(scale)


def _norm(x: Tensor, weight: Tensor, bias: Tensor, centred: bool, eps: float, out_dtype: torch.dtype | None) -> Tensor:
    x = x.contiguous()
    arguments = (x, weight, bias, centred, eps, out_dtype or x.dtype)
    return form(norm_forward, _forward, x, weight, bias)(*arguments)[0]


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, centred: bool, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """y and what backward needs: (M, 2) mean and scale of each token."""
    dim = x.shape[-1]
    tokens = x.numel() // dim
    y, saved = torch.empty(x.shape, dtype=out_dtype), torch.empty(tokens, 2)
    run_on_team(kernels.norm_forward_on_team, tokens, x, dim, weight, bias, centred, eps, y, saved)
    return y, saved


@torch.library.custom_op("megalodon::norm_forward", mutates_args=())
def norm_forward(
    x: Tensor, weight: Tensor, bias: Tensor, centred: bool, eps: float, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """_forward as an operator."""
    return _forward(x.detach(), weight.detach(), bias.detach(), centred, eps, out_dtype)


@norm_forward.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, centred: bool, eps: float, out_dtype: torch.dtype) -> Any:
    return x.new_empty(x.shape, dtype=out_dtype), x.new_empty(x.numel() // x.shape[-1], 2, dtype=torch.float32)


@torch.library.custom_op("megalodon::norm_backward", mutates_args=())
def norm_backward(
    x: Tensor, weight: Tensor, saved: Tensor, centred: bool, grad_y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias."""
    dim = x.shape[-1]
    tokens = x.numel() // dim
    stretches = -(-tokens // SUMMED_TOKENS)
    grad_x = x.new_empty(x.shape)
    grad_weight, grad_bias = (weight.new_empty(stretches, *weight.shape) for _ in range(2))
    inputs = (x, dim, weight, centred, saved, tokens, SUMMED_TOKENS)
    run_on_team(kernels.norm_backward_on_team, stretches, *inputs, grad_y, grad_x, grad_weight, grad_bias)
    return grad_x, grad_weight.sum(0), grad_bias.sum(0)


@norm_backward.register_fake
def _(x: Tensor, weight: Tensor, saved: Tensor, centred: bool, grad_y: Tensor) -> Any:
    return tuple(t.new_empty(t.shape) for t in (x, weight, weight))


def _save(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.centred = inputs[3]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor, _: None) -> Any:
    return *norm_backward(*ctx.saved_tensors, ctx.centred, grad_y.contiguous()), None, None, None


norm_forward.register_autograd(_backward, setup_context=_save)
