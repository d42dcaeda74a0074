"""Chunk parallelism: the ranks of a mesh's `chunk` dimension each read a part of the same sequence.

The model knows nothing of it. A part of a sequence needs the state at its entry, layer by layer, and that is a value
the layers take anyway: here it is put in by hooks when a layer is reached, and what leaves it is sent on at once.
Layers that can be combined (associative.py) are exchanged one by one, everything else that a block carries when the
block begins and ends. Where chunks end with the parts, keys and values are no part of the state and stay.
"""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..ops.linear_cross_entropy import Reduction
from ..state import State
from ..state_spec import Sealed, named, tree_map
from .associative import ASSOCIATIVE
from .entries import BlockEntry, LayerEntry, Piece, used_of_caches
from .exchange import Broadcast, Connect, Line, Share, forms_told, header_of, settle, widened
from .mesh import Exchange


class ChunkParallel:
    """A model whose sequences are read by all ranks of a group at once; called like the model itself.

    Every rank is given the whole tokens, and reads its part of them. Every rank gets the same loss, losses or logits,
    of the whole, and the State at its end; but gradients only of its own part: those of the parameters, and of the
    State before, add up over the group.

    Args:
        model: the same on every rank.
        group: of the ranks that share a sequence, in order.
        exchange: how states that can be combined are exchanged; all others go from rank to rank.
    """

    def __init__(self, model: Any, group: dist.ProcessGroup, exchange: Exchange = "chain"):
        self.model, self.group, self.exchange = model, group, exchange
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        self.sent = 0
        """Bytes that this rank has sent in forward passes and in the backward passes before the last forward."""
        self._lines: list[Line] = []
        self._layers = [_associative_layers(block) for block in model.layers]
        for block in model.layers:
            _Hooks(block)
        for layer in {layer for found in self._layers for layer in found.values()}:
            _Hooks(layer)
        if isinstance(model.output.final_norm, ASSOCIATIVE):
            _Hooks(model.output.final_norm)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["model"], name)

    @property
    def bytes_sent(self) -> int:
        """By this rank so far, in both directions."""
        return self.sent + sum(line.sent for line in self._lines)

    def __call__(
        self,
        tokens: Tensor,
        state: State | None = None,
        *,
        targets: Tensor | None = None,
        learnt: Tensor | None = None,
        reduction: Reduction = "mean",
        logits_to_keep: int | None = None,
        document_starts: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """See Decoder.forward."""
        settle()
        batch, length = tokens.shape
        valid = torch.ones(batch, length, dtype=torch.bool) if mask is None else mask.cpu()
        if not valid.any():
            return self.model(
                tokens, state, targets=targets, learnt=learnt, reduction=reduction, logits_to_keep=logits_to_keep,
                document_starts=document_starts, mask=mask,
            )  # fmt: skip
        entry = torch.zeros(batch, dtype=torch.int64) if state is None else state.position
        cuts = cut_columns(entry, length, self.model.config.reading_unit, self.ranks)
        starts = None if document_starts is None else document_starts.cpu() & valid
        line = Line(self.group, [r for r in range(self.ranks) if valid[:, cuts[r] : cuts[r + 1]].any()])
        self._remember(line)
        here = slice(cuts[self.rank], cuts[self.rank + 1])
        keep = None if logits_to_keep is None else max(0, here.stop - max(here.start, length - logits_to_keep))
        counts = valid if learnt is None else valid & learnt.cpu()
        if line.place < 0:
            made, after = self._nothing(tokens[:, :1], targets, reduction), None
        else:
            positions = positions_at(entry, starts, valid, cuts)
            piece = Piece(line, self.exchange if len(line.members) == self.ranks else "chain", valid, starts, cuts,
                          positions, self.model.config.reading_unit, self.model.dtype, self.model.device)  # fmt: skip
            begun = self._entry(piece, state, positions[line.members[line.place]])
            made, after = self.model(
                tokens[:, here], begun,
                targets=None if targets is None else targets[:, here],
                learnt=None if learnt is None else learnt[:, here],
                reduction=reduction, logits_to_keep=keep,
                document_starts=None if document_starts is None else document_starts[:, here],
                mask=None if mask is None else mask[:, here],
            )  # fmt: skip
        before = [] if state is None else [t for t in state.tensors().values() if t.requires_grad]
        reached = [*before, made] if made.requires_grad else before
        if targets is not None and reduction == "mean":
            made = self._shared(made * (int(counts[:, here].sum()) / max(1, int(counts.sum()))))
        else:
            shape: tuple[int, ...] = (batch, length)
            first = here.start
            if targets is None:
                kept = length if logits_to_keep is None else min(length, logits_to_keep)
                shape, first = (batch, kept, self.model.config.vocab_size), max(0, here.start - (length - kept))
            made = self._assembled(made, shape, first)
        if before and torch.is_grad_enabled():
            made = Connect.apply(made, *before)
        return made, self._at_end(line, after, batch, reached)

    def _remember(self, line: Line) -> None:
        """Count what past lines have sent; of those that may still send gradients, keep the last few."""
        self._lines.append(line)
        if len(self._lines) > 8:
            self.sent += self._lines.pop(0).sent

    def _nothing(self, some: Tensor, targets: Tensor | None, reduction: Reduction) -> Tensor:
        """Of a rank without tokens: no logits or losses, or a mean of 0, with a gradient of zero for every parameter.

        The model runs all the same, since FSDP2 exchanges weights and gradients in its forward and backward passes.

        Args:
            some: (B, 1) any tokens.
            targets, reduction: of the call.
        """
        none = None if targets is None else torch.zeros_like(some, dtype=torch.bool)
        answers = None if targets is None else some
        made, _ = self.model(some, targets=answers, learnt=none, reduction=reduction, logits_to_keep=0)
        return made[:, :0] if made.dim() else made

    def _entry(self, piece: Piece, state: State | None, position: Tensor) -> State:
        """What stands for the State at the entry of this rank's part."""
        given = None if state is None else state.parts
        blocks = tuple(
            BlockEntry(piece, i, spec, None if given is None else given["layers"][i], found)
            for i, (spec, found) in enumerate(zip(self.model.state_spec["layers"], self._layers, strict=True))
        )
        norm: Any = {}
        if isinstance(self.model.output.final_norm, ASSOCIATIVE):
            spec = self.model.state_spec["norm"]
            norm = LayerEntry(piece, len(blocks), 0, spec, None if given is None else given["norm"])
        parts = {"layers": blocks, "norm": norm, "position": position}
        return State(parts, self.model.state_spec, weakref.ref(self.model))

    def _shared(self, own: Tensor) -> Tensor:
        """The sum over ranks, with the gradient of this rank's share."""
        shares = torch.zeros(self.ranks, dtype=torch.float64, device=own.device)
        shares[self.rank] = own.detach()
        dist.all_reduce(shares, group=self.group)
        return Share.apply(own, shares.sum().to(own.dtype))

    def _assembled(self, own: Tensor, shape: tuple[int, ...], first: int) -> Tensor:
        """Columns of all ranks, with the gradient of this rank's."""
        dtype = torch.promote_types(self.model.dtype, torch.float32)
        whole = torch.zeros(shape, dtype=dtype, device=self.model.device)
        columns = slice(first, first + (own.shape[1] if own.dim() > 1 else 0))
        if own.dim() > 1:
            whole[:, columns] = own.detach()
        dist.all_reduce(whole, group=self.group)
        if own.dim() > 1 and own.requires_grad:
            whole = torch.cat([whole[:, : columns.start], own, whole[:, columns.stop :]], 1)
        elif own.requires_grad:
            whole = whole + own
        return whole

    def _at_end(self, line: Line, after: State | None, batch: int, reached: list[Tensor]) -> State:
        """The State after the last token, on every rank; a backward pass from it reaches these tensors."""
        spec = self.model.state_spec
        leaves = [leaf for _, leaf in named(spec)]
        tensors: list[Tensor] = []
        device = self.model.device
        header = torch.empty(16 * len(leaves), dtype=torch.uint8, device=device)
        if line.is_last:
            assert after is not None
            tensors = list(after.tensors().values())
            header = header_of(tensors, used_of_caches(spec, after.parts)).to(device)
        dist.broadcast(header, group=self.group, group_src=line.members[-1])
        forms = forms_told(header, leaves, batch)
        anchor = torch.zeros((), device=device, requires_grad=torch.is_grad_enabled())
        if reached and torch.is_grad_enabled():
            anchor = Connect.apply(anchor, *reached)
        made = Broadcast.apply(line, forms, anchor, *tensors)
        whole = iter(
            widened(t, (batch, *leaf.shape)).to("cpu" if leaf.on_cpu else device)
            for t, leaf in zip(made, leaves, strict=True)
        )
        return State(tree_map(lambda _: next(whole), spec), spec, weakref.ref(self.model))


class _Hooks:
    """Around a block or a layer: the entry that was put in its place is turned into a state, what leaves is sent on."""

    def __init__(self, module: nn.Module):
        self.open: Any = None
        module.register_forward_pre_hook(self.enter)
        module.register_forward_hook(self.leave)

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        bare = [arg.tree if isinstance(arg, Sealed) else arg for arg in args]
        at = next((i for i, arg in enumerate(bare) if isinstance(arg, BlockEntry | LayerEntry)), None)
        self.open = None if at is None else bare[at]
        if at is None:
            return None
        x, opened = self.open.enter(module, args[0], *args[at + 1 :])
        sealed = isinstance(args[at], Sealed) and opened is not None
        return (x, *args[1:at], Sealed(opened) if sealed else opened, *args[at + 1 :])

    def leave(self, module: nn.Module, args: Any, made: Any) -> Any:
        entry, self.open = self.open, None
        return None if entry is None else (entry.leave(made[0], made[-1]), *made[1:])


def _associative_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Of a block whose state is parts by name: the layers that can be combined, by the names of their parts."""
    spec: Any = block.state_spec
    if not isinstance(spec, dict):
        return {}
    layers = [m for m in block.modules() if isinstance(m, ASSOCIATIVE)]
    found = {name: [m for m in layers if m.state_spec == part] for name, part in spec.items()}
    return {name: same[0] for name, same in found.items() if len(same) == 1}


def cut_columns(entry: Tensor, length: int, unit: int, ranks: int) -> list[int]:
    """Where the parts of a sequence begin, and where the last one ends: at ends of chunks where there are enough.

    Args:
        entry: (B,) position of each row at the first column; chunks of the first row decide.
        length: columns.
        unit: tokens of a chunk.
        ranks: parts.
    """
    offset = -int(entry[0]) % unit if len(entry) else 0
    if length - offset >= ranks * unit:
        inside = [offset + round((length * r / ranks - offset) / unit) * unit for r in range(1, ranks)]
    else:
        inside = [length * r // ranks for r in range(1, ranks)]
    return [0, *inside, length]


def positions_at(entry: Tensor, starts: Tensor | None, valid: Tensor, cuts: list[int]) -> list[Tensor]:
    """(B,) for each cut: how many tokens of its document a row has read there; `starts` at padding are ignored."""
    found = []
    seen = torch.cat([torch.zeros(len(valid), 1, dtype=torch.int64), valid.cumsum(1)], 1)  # before each column
    for cut in cuts:
        position = entry + seen[:, cut]
        if starts is not None and cut:
            columns = torch.arange(1, cut + 1)
            last = (starts[:, :cut] * columns).amax(1)  # column of the last start, counted from 1; 0 for none
            since = seen[:, cut] - seen.gather(1, (last - 1).clamp(min=0)[:, None])[:, 0]
            position = torch.where(last > 0, since, position)
        found.append(position)
    return found
