"""The linear layer: as PyTorch's, but reading with it rounds its weights once and not for each piece."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import gates, residual
from ..ops import linear as reading
from .initialization import Initialiser


class Linear(nn.Linear):
    """x @ weight.T + bias, in the type of autocast where that is on.

    Args:
        fan_in: features of x.
        fan_out: features of the result.
        bias: whether there is one; it starts at zero.
        init: draws the initial weight; None for one that is tied to another module's.
    """

    def __init__(self, fan_in: int, fan_out: int, bias: bool, init: Initialiser | None):
        super().__init__(fan_in, fan_out, bias)
        self.init = init

    def reset_parameters(self) -> None:
        """Nothing: PyTorch's constructor would draw here."""

    def init_weights(self) -> None:
        """Draw the weight."""
        if self.init is not None:
            self.init(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., fan_in) to (..., fan_out)."""
        if _reads(x, self):
            return reading.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight, self.bias)  # with gradients, autocast rounds and knows the way back


def _reads(x: Tensor, layer: nn.Linear) -> bool:
    """Whether a layer reads with weights that are rounded once: without gradients, and types that go together."""
    if torch.is_grad_enabled() or layer.weight.dtype == torch.float64:
        return False
    return torch.is_autocast_enabled(x.device.type) or x.dtype == layer.weight.dtype


def is_heard(module: nn.Module) -> bool:
    """Whether somebody listens to what goes into a module or comes out, so that it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def may_join(x: Tensor, *layers: nn.Module) -> bool:
    """Whether layers may read with each other, or with what is around them: as they are here, and unheard."""
    return all(type(layer) is Linear and _reads(x, layer) and not is_heard(layer) for layer in layers)


def linears(x: Tensor, *layers: Linear) -> tuple[Tensor, ...]:
    """Several layers of x (..., fan_in)."""
    if may_join(x, *layers):
        return reading.linears(x, tuple((layer.weight, layer.bias) for layer in layers))
    return tuple(layer(x) for layer in layers)


def linear_silu(x: Tensor, layer: Linear) -> Tensor:
    """SiLU of a layer of x (..., fan_in)."""
    return reading.linear_silu(x, (layer.weight, layer.bias)) if may_join(x, layer) else gates.silu(layer(x))


def linear_gate(x: Tensor, gate: Linear, layer: Linear) -> Tensor:
    """SiLU of one layer of x (..., fan_in) times another."""
    if may_join(x, gate, layer):
        return reading.linear_gate(x, (gate.weight, gate.bias), (layer.weight, layer.bias))
    return gates.silu_gate(gate(x), layer(x))


def linear_add(x: Tensor, layer: Linear, stream: Tensor, other: Tensor | None = None) -> Tensor:
    """The residual stream plus a layer of x (..., fan_in), and plus another branch."""
    if may_join(x, layer):
        return reading.linear_add(x, (layer.weight, layer.bias), stream, other)
    branches = (t for t in (other, layer(x)) if t is not None)
    return residual.add_branch(stream, *branches)
