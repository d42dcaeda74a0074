"""What stands in the place of an entry state until its block or layer is reached, and sends on what leaves it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..state_spec import TensorSpec, Tree, named, tree_map
from .associative import combine
from .exchange import Connect, Form, Gather, Line, Receive, SendOn, fixed_forms, forms_told, header_of, widened
from .mesh import Exchange

MOST_PARTS = 8  # of a block, for the tags of their messages


@dataclass
class Piece:
    """One forward pass over a sequence that several ranks share.

    Args:
        line: the ranks with tokens.
        exchange: of states that can be combined.
        valid: (B, L) bool, False at padding.
        starts: (B, L) bool, where documents begin; None for nowhere.
        cuts: columns at which the parts of all ranks of the group begin and end.
        positions: (B,) of each cut, tokens read of each row's document.
        unit: tokens of a chunk.
        dtype: of the weights.
        device: of the model.
    """

    line: Line
    exchange: Exchange
    valid: Tensor
    starts: Tensor | None
    cuts: list[int]
    positions: list[Tensor]
    unit: int
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        """B."""
        return len(self.valid)

    def lengths(self, member: int) -> Tensor:
        """(B,) tokens of each row that a rank has."""
        return self.valid[:, self.cuts[member] : self.cuts[member + 1]].sum(1)

    def begins(self, member: int) -> Tensor:
        """(B,) whether a document begins among them."""
        if self.starts is None:
            return torch.zeros(self.rows, dtype=torch.bool)
        return self.starts[:, self.cuts[member] : self.cuts[member + 1]].any(1)

    def at_chunk_end(self, place: int) -> bool:
        """Whether every row is at the end of a chunk where a place of the line begins."""
        return not (self.positions[self.line.members[place]] % self.unit).any()

    def anchor(self) -> Tensor:
        """What makes states that arrive part of the graph."""
        return torch.zeros((), device=self.device, requires_grad=torch.is_grad_enabled())


@dataclass
class LayerEntry:
    """The entry state of a layer that can be combined.

    Activation checkpointing runs a layer twice: the second time, what was received is there, and nothing is sent.

    Args:
        piece: whose forward pass it is.
        block, part: for the tags of messages.
        spec: of the layer's state.
        given: the state before the sequence, or None for nothing.
    """

    piece: Piece
    block: int
    part: int
    spec: Tree
    given: Tree
    kept: list[Tensor] = field(default_factory=list)
    sent: bool = False

    @property
    def tag(self) -> int:
        """Of its messages."""
        return self.block * MOST_PARTS + self.part

    @property
    def leaves(self) -> list[TensorSpec]:
        """What it is made of."""
        return [leaf for _, leaf in named(self.spec)]

    def enter(self, layer: nn.Module, x: Tensor, boundaries: Any = None) -> tuple[Tensor, Tree]:
        """The layer's x, and the state at its entry."""
        if self.piece.exchange == "parallel":
            return self._combined(layer, x, boundaries)
        if self.piece.line.is_first:
            return x, self.given
        forms = fixed_forms(self.leaves, self.piece.rows, self.piece.dtype)
        made = Receive.apply(self.piece.line, self.tag, forms, self.kept, self.piece.anchor())
        return Connect.apply(x, *made), self._tree(made)  # whether the layer uses it or not, its gradient is waited for

    def _combined(self, layer: nn.Module, x: Tensor, boundaries: Any) -> tuple[Tensor, Tree]:
        line = self.piece.line
        _, total = type(layer).forward(layer, x, None, boundaries)
        gathered = Gather.apply(line, self.kept, *(t for _, t in named(total)))
        count = len(self.leaves)
        before = Connect.apply(x, *gathered)
        state = self.given
        if state is None:
            state = tree_map(lambda leaf: leaf.empty(self.piece.rows, x.device, self.piece.dtype), self.spec)
        for place in range(line.place):
            part = self._tree(gathered[place * count : (place + 1) * count])
            member = line.members[place]
            state = combine(layer, state, part, self.piece.lengths(member), self.piece.begins(member))
        return before, state

    def _tree(self, tensors: Any) -> Tree:
        each = iter(tensors)
        return tree_map(lambda _: next(each), self.spec)

    def leave(self, y: Tensor, leaving: Tree) -> Tensor:
        """y, and the exit state to the next rank."""
        if self.piece.exchange == "parallel" or self.piece.line.is_last:
            return y
        forms = fixed_forms(self.leaves, self.piece.rows, self.piece.dtype)
        fresh, self.sent = not self.sent, True
        return SendOn.apply(self.piece.line, self.tag, forms, fresh, y, *(t for _, t in named(leaving)))


@dataclass
class BlockEntry:
    """The entry state of a block: entries of the layers in it, and all else that it carries, from the rank before.

    Args:
        piece: whose forward pass it is.
        block: number.
        spec: of the block's state.
        given: the state before the sequence, or None for nothing.
        layers: those that can be combined, by the names of their parts of the state.
    """

    piece: Piece
    block: int
    spec: Tree
    given: Tree
    layers: dict[str, nn.Module]
    kept: list[Tensor] = field(default_factory=list)
    forms: list[Form] = field(default_factory=list)
    received: list[Tensor] = field(default_factory=list)
    forms_sent: list[Form] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.entries = {
            name: LayerEntry(self.piece, self.block, part, self.spec[name], self.given and self.given[name])
            for part, name in enumerate(self.layers)
        }
        self.rest = {n: s for n, s in self.spec.items() if n not in self.layers} if self.layers else self.spec

    @property
    def tag(self) -> int:
        """Of its messages: the last of the block."""
        return self.block * MOST_PARTS + MOST_PARTS - 1

    def travels(self, place: int) -> bool:
        """Whether anything but combined states goes to a place of the line from the one before."""
        leaves = list(named(self.rest))
        return bool(leaves) and not (_only_caches(self.rest) and self.piece.at_chunk_end(place))

    def enter(self, block: nn.Module, x: Tensor, boundaries: Any = None) -> tuple[Tensor, Tree]:
        """x, and the state that the block is given: in it, entries stand for those of its layers."""
        line = self.piece.line
        travels = not line.is_first and self.travels(line.place)
        if self.layers:
            rest = {n: self.given[n] for n in self.rest} if line.is_first and self.given is not None else {}
            return x, _Arriving({**self.entries, **rest}, self._received if travels else None)
        return x, self.given if line.is_first else self._received() if travels else None

    def _received(self) -> Tree:
        piece = self.piece
        leaves = [leaf for _, leaf in named(self.rest)]
        if not self.forms:
            header = piece.line.receive(16 * len(leaves), -1, self.tag, piece.device)
            self.forms += forms_told(header, leaves, piece.rows)
        made = Receive.apply(piece.line, self.tag, self.forms, self.kept, piece.anchor())
        self.received = list(made)
        whole = iter(
            widened(t, (piece.rows, *leaf.shape)).to("cpu" if leaf.on_cpu else piece.device)
            for t, leaf in zip(made, leaves, strict=True)
        )
        return tree_map(lambda _: next(whole), self.rest)

    def leave(self, x: Tensor, leaving: Tree) -> Tensor:
        """x, and the rest of the exit state to the next rank."""
        line = self.piece.line
        x, self.received = Connect.apply(x, *self.received), []  # as of a layer
        if line.is_last or not self.travels(line.place + 1):
            return x
        rest = {name: leaving[name] for name in self.rest} if self.layers else leaving
        tensors: list[Tensor] = [t for _, t in named(rest)]
        fresh = not self.forms_sent
        if fresh:
            header = header_of(tensors, used_of_caches(self.rest, rest))
            self.forms_sent = forms_told(header, [leaf for _, leaf in named(self.rest)], self.piece.rows)
            line.send(header.to(x.device), 1, self.tag)
        return SendOn.apply(line, self.tag, self.forms_sent, fresh, x, *tensors)


class _Arriving(dict[str, Tree]):
    """Parts of a state by name, of which some come from the rank before, once one of them is asked for.

    That rank sends them at the end of its block, and may wait for this one before, where layers are combined.

    Args:
        parts: those that are here.
        receive: gives the others; None where there are none.
    """

    def __init__(self, parts: dict[str, Tree], receive: Callable[[], dict[str, Tree]] | None):
        super().__init__(parts)
        self._receive = receive

    def get(self, name: str, default: Any = None) -> Any:
        if name not in self and self._receive is not None:
            self.update(self._receive())
            self._receive = None
        return super().get(name, default)


def _only_caches(spec: Tree) -> bool:
    """Whether a state is nothing but caches that are empty at the end of a chunk, and how full they are."""
    leaves: dict[str, TensorSpec] = dict(named(spec))
    fills = {".".join([*name.split(".")[:-1], leaf.fill]) for name, leaf in leaves.items() if leaf.fill}
    return all((leaf.fill and not leaf.kept) or name in fills for name, leaf in leaves.items())


def used_of_caches(spec: Tree, parts: Tree) -> list[int | None]:
    """Of every tensor that is a cache, how many entries some row uses; None of all others."""
    tensors: dict[str, Tensor] = dict(named(parts))
    found: list[int | None] = []
    leaf: TensorSpec
    for name, leaf in named(spec):
        beside = ".".join([*name.split(".")[:-1], leaf.fill])
        fill = tensors[beside] if leaf.fill else None
        found.append(None if fill is None else int(fill.max()) if len(fill) else 0)
    return found
