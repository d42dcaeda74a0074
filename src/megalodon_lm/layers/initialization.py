"""Initial values of matrices, as in the authors' code. Layers are given one of these; see Megalodon.init_weights."""

import math
from collections.abc import Callable

from torch import Tensor, nn

from ..config import InitMode

Initialiser = Callable[[Tensor], object]  # fills a (fan_out, fan_in) weight in place


def init_he(weight: Tensor) -> None:
    """Normal with std 1/sqrt(3 fan_in)."""
    nn.init.normal_(weight, std=1 / math.sqrt(3 * weight.shape[1]))


def init_bert(weight: Tensor) -> None:
    """Normal with std 0.02."""
    nn.init.normal_(weight, std=0.02)


def init_embedding(weight: Tensor) -> None:
    """Fill a (vocabulary, D) weight: truncated normal, std 1/sqrt(D), cut at 3 std."""
    std = 1 / math.sqrt(weight.shape[1])
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


INITIALISERS: dict[InitMode, Initialiser] = {"he": init_he, "bert": init_bert, "xavier": nn.init.xavier_uniform_}
