"""Linear layers that read: without gradients, with weights that are rounded once, and with what follows them.

A layer is its weight (fan_out, fan_in) and its bias (fan_out,) or None; both are rounded to the type of x.
"""

import torch.nn.functional as F
from torch import Tensor

from .backend import op
from .derived import rounded
from .gates import silu, silu_gate
from .residual import add_branch

Layer = tuple[Tensor, Tensor | None]


@op(rounded=1)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias in the type of x, to which weight and bias are rounded once and not for each piece.

    Args:
        x: (..., fan_in).
        weight, bias: of a layer.

    Returns:
        (..., fan_out).
    """
    return F.linear(x, rounded(weight, x.dtype), None if bias is None else rounded(bias, x.dtype))


@op(rounded=1)
def linears(x: Tensor, layers: tuple[Layer, ...]) -> tuple[Tensor, ...]:
    """`linear` for each of several layers."""
    return tuple(linear(x, *layer) for layer in layers)


@op(rounded=1)
def linear_silu(x: Tensor, layer: Layer) -> Tensor:
    """SiLU of a layer."""
    return silu(linear(x, *layer))


@op(rounded=1)
def linear_gate(x: Tensor, gate: Layer, layer: Layer) -> Tensor:
    """SiLU of one layer times another."""
    return silu_gate(linear(x, *gate), linear(x, *layer))


@op(rounded=1)
def linear_add(x: Tensor, layer: Layer, residual: Tensor, other: Tensor | None = None) -> Tensor:
    """A layer added to the residual stream, and with it another branch of its type; as `add_branch`."""
    return add_branch(residual, *(t for t in (other, linear(x, *layer)) if t is not None))
