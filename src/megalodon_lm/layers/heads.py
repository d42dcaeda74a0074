"""Heads of attention, known by their width: how many there are follows from the weights."""

from torch import Tensor

from ..errors import InputError


def split_heads(x: Tensor, width: int, name: str) -> Tensor:
    """(..., H * width) to (..., H, width).

    Raises:
        InputError: naming the features, where they are no whole heads.
    """
    if x.shape[-1] % width:
        raise InputError(f"{x.shape[-1]} features of {name} are no whole heads of width {width}; shard by whole heads")
    return x.unflatten(-1, (-1, width))
