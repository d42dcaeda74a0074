"""What attention takes, and a group of its queries: one run of tokens and the keys that they see."""

from typing import Any, NamedTuple

from torch import Tensor

from .simd import as_numpy


class Group(NamedTuple):
    """Tokens begin..end of a row, how many keys before them they see, and how many entries of its cache are used."""

    row: int
    begin: int
    end: int
    before: int
    entries: int


class Operands(NamedTuple):
    """What attention takes, or the gradients of that: (B, L, H, d) of the piece, (B, n, H, d) of the entry cache.

    Tensors, or their memory in compiled code.
    """

    q: Any
    k: Any
    v: Any
    keys: Any
    values: Any

    def arrays(self) -> "Operands":
        """Their memory."""
        return Operands(*map(as_numpy, self))

    @property
    def of_piece_alone(self) -> bool:
        """Whether there is nothing of a cache; as gradients: whether those to a cache are not asked for."""
        return self.keys is self.k


def operands(q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, values: Tensor | None) -> Operands:
    """Where there is nothing of a cache, the piece stands in its place, and nobody reads or writes an entry."""
    return Operands(q, k, v, k if keys is None else keys, v if values is None else values)
