"""Initial values of the weights, as in the authors' code."""

import math

import torch
from torch import Tensor, nn

from ..config import InitMode


def init_linear(weight: Tensor, mode: InitMode) -> None:
    """Fill a (fan_out, fan_in) weight in place.

    `he`: normal with std 1/sqrt(3 fan_in); `bert`: normal with std 0.02; `xavier`: Glorot uniform.
    """
    if mode == "he":
        nn.init.normal_(weight, std=1 / math.sqrt(3 * weight.shape[1]))
    elif mode == "bert":
        nn.init.normal_(weight, std=0.02)
    else:
        nn.init.xavier_uniform_(weight)


def init_embedding(weight: Tensor) -> None:
    """Fill a (vocabulary, D) weight in place: truncated normal, std 1/sqrt(D), cut at 3 std."""
    std = 1 / math.sqrt(weight.shape[1])
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


def linear(fan_in: int, fan_out: int, bias: bool, mode: InitMode) -> nn.Linear:
    """A linear layer with that initialisation and a zero bias."""
    layer = nn.utils.skip_init(nn.Linear, fan_in, fan_out, bias=bias, device=torch.get_default_device())
    init_linear(layer.weight, mode)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
