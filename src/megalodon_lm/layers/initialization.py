"""Initial values of the weights, as in the authors' code.

Weights on the meta device are left alone: they are to be loaded, and drawing numbers there makes PyTorch import its
compiler, which takes a second.
"""

import math

from torch import Tensor, nn

from ..config import InitMode
from .linear import Linear


def init_linear(weight: Tensor, mode: InitMode) -> None:
    """Fill a (fan_out, fan_in) weight in place.

    `he`: normal with std 1/sqrt(3 fan_in); `bert`: normal with std 0.02; `xavier`: Glorot uniform.
    """
    if weight.is_meta:
        return
    if mode == "he":
        nn.init.normal_(weight, std=1 / math.sqrt(3 * weight.shape[1]))
    elif mode == "bert":
        nn.init.normal_(weight, std=0.02)
    else:
        nn.init.xavier_uniform_(weight)


def init_embedding(weight: Tensor) -> None:
    """Fill a (vocabulary, D) weight in place: truncated normal, std 1/sqrt(D), cut at 3 std."""
    if weight.is_meta:
        return
    std = 1 / math.sqrt(weight.shape[1])
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def linear(fan_in: int, fan_out: int, bias: bool, mode: InitMode) -> Linear:
    """A linear layer with that initialisation and a zero bias."""
    layer = Linear(fan_in, fan_out, bias)
    init_linear(layer.weight, mode)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
