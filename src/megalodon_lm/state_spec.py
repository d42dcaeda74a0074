"""What layers say of the state they carry, and the tree of named parts that it is.

A tree is a dict, a tuple or a NamedTuple of trees, down to tensors. A layer's `state_spec` is the same tree with a
TensorSpec in place of each tensor: all that a State must know of a layer follows from it.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Tree = Any
"""Nested dicts, tuples and NamedTuples of tensors, or of what a layer says of them."""


class Sealed:
    """The entry or exit state of a module, in an object that wrappers of modules do not look into; see State."""

    def __init__(self, tree: Tree):
        self.tree = tree


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of a state, for each of its rows. All zeros is the state of nothing.

    Attributes:
        shape: of a row.
        dtype: None for the type that is asked for when a state is made, and that State.to changes; a floating type is
            widened to that one and else kept; an integer type is what it says.
        fill: of a cache, the name of the tensor beside it that tells how many entries of the first dimension each row
            uses: no others are stored.
        on_cpu: wherever the rest is; it decides shapes.
        kept: of a cache, most entries that are used at the end of a reading unit, such as a chunk.
    """

    shape: tuple[int, ...] = ()
    dtype: torch.dtype | None = None
    fill: str = ""
    on_cpu: bool = False
    kept: int = 0

    def dtype_for(self, asked: torch.dtype) -> torch.dtype:
        """The type of the tensor in a state of a type."""
        if self.dtype is None:
            return asked
        return torch.promote_types(self.dtype, asked) if self.dtype.is_floating_point else self.dtype

    def nbytes(self, dtype: torch.dtype, at_chunk_end: bool = False) -> int:
        """Bytes of a row in a state of a type; at the end of a reading unit, of a cache only what is used there."""
        shape = (self.kept, *self.shape[1:]) if self.fill and at_chunk_end else self.shape
        return math.prod(shape) * self.dtype_for(dtype).itemsize

    def empty(self, batch: int, device: torch.device | str, dtype: torch.dtype) -> Tensor:
        """The tensor of rows that read nothing."""
        place = torch.device("cpu") if self.on_cpu else device
        return torch.zeros(batch, *self.shape, dtype=self.dtype_for(dtype), device=place)


def declare(*shape: int, dtype: torch.dtype | None = None, fill: str = "", on_cpu: bool = False, kept: int = 0) -> Any:
    """A TensorSpec, to stand in a tree where its tensor will."""
    return TensorSpec(shape, dtype, fill, on_cpu, kept)


def named(tree: Tree, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every leaf with its path: keys, indices and fields, joined by dots."""
    parts: Iterable[tuple[Any, Any]]
    if isinstance(tree, dict):
        parts = tree.items()
    elif isinstance(tree, tuple):
        parts = zip(getattr(tree, "_fields", range(len(tree))), tree, strict=True)
    else:
        yield name, tree
        return
    for key, part in parts:
        yield from named(part, f"{name}.{key}" if name else str(key))


def tree_map(change: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
    """The tree with each leaf changed, with the leaves at its place in other trees; in the order of named."""
    if isinstance(tree, dict):
        return {key: tree_map(change, part, *(other[key] for other in others)) for key, part in tree.items()}
    if isinstance(tree, tuple):
        parts = (tree_map(change, *same) for same in zip(tree, *others, strict=True))
        return type(tree)(*parts) if hasattr(tree, "_fields") else tuple(parts)
    return change(tree, *others)


def present(parts: dict[str, Tree]) -> dict[str, Tree]:
    """Of parts by name, those that carry something."""
    return {name: part for name, part in parts.items() if part is not None}
