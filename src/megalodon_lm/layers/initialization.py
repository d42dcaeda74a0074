"""Initial values of matrices, as in the authors' code. Layers are given one of these; see Megalodon.init_weights."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..config import InitMode

Initialiser = Callable[[Tensor], object]  # fills a (fan_out, fan_in) weight in place


def init_he(weight: Tensor) -> None:
    """Normal with std 1/sqrt(3 fan_in)."""
    nn.init.normal_(weight, std=1 / math.sqrt(3 * weight.shape[1]))


def init_bert(weight: Tensor) -> None:
    """Normal with std 0.02."""
    nn.init.normal_(weight, std=0.02)


def init_uniform(weight: Tensor) -> None:
    """Uniform within 1/sqrt(fan_in), as PyTorch's linear layers are."""
    bound = 1 / math.sqrt(weight.shape[1])
    nn.init.uniform_(weight, -bound, bound)


def init_embedding(weight: Tensor) -> None:
    """Fill a (vocabulary, D) weight: truncated normal, std 1/sqrt(D), cut at 3 std."""
    std = 1 / math.sqrt(weight.shape[1])
    nn.init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)


@torch.no_grad()
def init_time_step(bias: Tensor) -> None:
    """Fill what a softplus turns into steps from 0.001 to 0.1, uniform in their logarithm, as in Mamba."""
    step = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(0.1)).exp_()
    bias.copy_(step + torch.log(-torch.expm1(-step)))


@contextmanager
def whole_parameters(layer: nn.Module) -> Iterator[None]:
    """Meanwhile a layer's own parameters, where they are sharded (DTensor), are whole: drawing is of whole tensors.

    The shards are then parts of what the first process drew, so that a seed means the same weights as in one process.
    """
    sharded: dict[str, Any] = {name: p for name, p in layer.named_parameters(recurse=False) if hasattr(p, "placements")}
    for name, p in sharded.items():
        setattr(layer, name, nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device=p.device)))
    yield
    for name, p in sharded.items():
        from torch.distributed.tensor import distribute_tensor

        whole = getattr(layer, name)
        setattr(layer, name, p)
        with torch.no_grad():
            p.copy_(distribute_tensor(whole.detach(), p.device_mesh, p.placements))


INITIALISERS: dict[InitMode, Initialiser] = {"he": init_he, "bert": init_bert, "xavier": nn.init.xavier_uniform_}
