"""What ranks send each other of states, with gradients: from each to the next, from one to all, from all to all.

Tensors travel as they are, in one message of bytes: nothing is rounded, counts stay whole numbers. What arrives takes
part in autograd; the backward pass sends gradients of the same sizes the other way.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..state_spec import TensorSpec

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.bool)
"""By their number in a header."""


class Form(NamedTuple):
    """Type and shape of a tensor that travels."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """In a message."""
        return self.dtype.itemsize * math.prod(self.shape)

    @property
    def has_gradient(self) -> bool:
        """Whether its gradient comes back."""
        return self.dtype.is_floating_point


_on_the_way: list[tuple[Any, Tensor]] = []
"""Messages that may not have been taken yet: dropped, they would never arrive."""


def settle() -> None:
    """Wait until all that was sent has been taken."""
    while _on_the_way:
        _on_the_way.pop(0)[0].wait()


class Line:
    """The ranks that hold parts of a sequence, in its order.

    Args:
        group: of all that could.
        members: those that do, by their numbers in the group.

    Attributes:
        sent: bytes that this rank has sent to others, gradients included.
    """

    def __init__(self, group: dist.ProcessGroup, members: Sequence[int]):
        self.group, self.members = group, list(members)
        self.rank = dist.get_rank(group)
        self.place = self.members.index(self.rank) if self.rank in self.members else -1
        self.sent = 0

    @property
    def is_first(self) -> bool:
        """Whether the sequence begins here."""
        return self.place == 0

    @property
    def is_last(self) -> bool:
        """Whether it ends here."""
        return self.place == len(self.members) - 1

    def send(self, message: Tensor, step: int, tag: int) -> None:
        """To the rank so many places further; returns at once."""
        if not message.numel():
            return
        work = dist.isend(message, group=self.group, group_dst=self.members[self.place + step], tag=tag)
        _on_the_way.append((work, message))
        self.sent += message.numel()

    def receive(self, nbytes: int, step: int, tag: int, device: torch.device) -> Tensor:
        """From the rank so many places further."""
        message = torch.empty(nbytes, dtype=torch.uint8, device=device)
        if nbytes:
            dist.recv(message, group=self.group, group_src=self.members[self.place + step], tag=tag)
        return message


def pack(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """One message."""
    parts = [t.detach().to(device).contiguous().flatten().view(torch.uint8) for t in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8, device=device)


def unpack(message: Tensor, forms: Sequence[Form]) -> list[Tensor]:
    """What `pack` was given."""
    parts = message.split([form.nbytes for form in forms])
    return [p.clone().view(form.dtype).view(form.shape) for p, form in zip(parts, forms, strict=True)]


def fixed_forms(leaves: Sequence[TensorSpec], rows: int, dtype: torch.dtype) -> list[Form]:
    """Of tensors whose types and sizes follow from what the layer declares and from the type of its weights."""
    return [Form(leaf.dtype_for(dtype), (rows, *leaf.shape)) for leaf in leaves]


def header_of(tensors: Sequence[Tensor], fills: Sequence[int | None]) -> Tensor:
    """Type and width of each tensor, as a message: what no one else can know.

    Args:
        tensors: as they are.
        fills: how much is used of each cache; None for what is none.
    """
    told = [(DTYPES.index(t.dtype), -1 if fill is None else fill) for t, fill in zip(tensors, fills, strict=True)]
    return torch.tensor(told, dtype=torch.int64).flatten().view(torch.uint8)


def forms_told(header: Tensor, leaves: Sequence[TensorSpec], rows: int) -> list[Form]:
    """The forms that a header tells."""
    forms = []
    told = header.cpu().view(torch.int64).view(-1, 2).tolist()
    for (dtype, width), leaf in zip(told, leaves, strict=True):
        shape = leaf.shape if width < 0 else (width, *leaf.shape[1:])
        forms.append(Form(DTYPES[dtype], (rows, *shape)))
    return forms


def narrowed(t: Tensor, form: Form) -> Tensor:
    """Of a cache, what is used."""
    return t if t.shape == form.shape else t[:, : form.shape[1]]


def widened(t: Tensor, shape: Sequence[int]) -> Tensor:
    """The cache in its full length again."""
    if t.shape == tuple(shape):
        return t
    full = t.new_zeros(tuple(shape))
    full[:, : t.shape[1]] = t
    return full


class SendOn(torch.autograd.Function):
    """Gives states to the next rank; x goes through, so that the backward pass waits here for their gradients."""

    @staticmethod
    def forward(ctx: Any, line: Line, tag: int, forms: list[Form], fresh: bool, x: Tensor, *states: Tensor) -> Tensor:
        if fresh:
            line.send(pack([narrowed(t, form) for t, form in zip(states, forms, strict=True)], x.device), 1, tag)
        ctx.line, ctx.tag, ctx.forms, ctx.device = line, tag, forms, x.device
        ctx.shapes = [t.shape for t in states]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = [form for form in ctx.forms if form.has_gradient]
        message = ctx.line.receive(sum(form.nbytes for form in given), 1, ctx.tag, ctx.device)
        made = iter(unpack(message, given))
        of_states = [
            widened(next(made), shape) if form.has_gradient else None
            for form, shape in zip(ctx.forms, ctx.shapes, strict=True)
        ]
        return None, None, None, None, grads[0], *of_states


class Receive(torch.autograd.Function):
    """The states that the rank before gave; `anchor` only makes them part of the graph."""

    @staticmethod
    def forward(ctx: Any, line: Line, tag: int, forms: list[Form], kept: list[Tensor], anchor: Tensor) -> Any:
        if not kept:
            kept += unpack(line.receive(sum(form.nbytes for form in forms), -1, tag, anchor.device), forms)
        ctx.line, ctx.tag, ctx.forms, ctx.device = line, tag, forms, anchor.device
        made = tuple(t.view_as(t) for t in kept)
        ctx.mark_non_differentiable(*(t for t in made if not t.is_floating_point()))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        given = [grad for grad, form in zip(grads, ctx.forms, strict=True) if form.has_gradient]
        ctx.line.send(pack(given, ctx.device), -1, ctx.tag)
        return None, None, None, None, None


class Gather(torch.autograd.Function):
    """The states of all ranks of a line, those of the first rank first."""

    @staticmethod
    def forward(ctx: Any, line: Line, kept: list[Tensor], *states: Tensor) -> Any:
        forms = [Form(t.dtype, tuple(t.shape)) for t in states]
        device = states[-1].device
        if not kept:
            message = pack(states, device)
            messages = [torch.empty_like(message) for _ in line.members]
            dist.all_gather(messages, message, group=line.group)
            line.sent += message.numel() * (len(line.members) - 1)
            kept += [t for m in messages for t in unpack(m, forms)]
        ctx.line, ctx.forms, ctx.device = line, forms, device
        made = tuple(t.view_as(t) for t in kept)
        ctx.mark_non_differentiable(*(t for t in made if not t.is_floating_point()))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        """Each rank adds up what all others found for its own states."""
        line, count = ctx.line, len(ctx.forms)
        given = [form for form in ctx.forms if form.has_gradient]
        mine = [
            pack(
                [g for g, form in zip(grads[at : at + count], ctx.forms, strict=True) if form.has_gradient], ctx.device
            )
            for at in range(0, len(grads), count)
        ]
        received = torch.empty(len(mine) * len(mine[0]), dtype=torch.uint8, device=ctx.device)
        dist.all_to_all_single(received, torch.cat(mine), group=line.group)
        line.sent += len(mine[0]) * (len(mine) - 1)
        parts = [unpack(m, given) for m in received.chunk(len(mine))]
        sums = iter([sum(same[1:], same[0]) for same in zip(*parts, strict=True)])
        return None, None, *(next(sums) if form.has_gradient else None for form in ctx.forms)


class Broadcast(torch.autograd.Function):
    """The states of the last rank of a line, for every rank of its group; `anchor` makes them part of the graph."""

    @staticmethod
    def forward(ctx: Any, line: Line, forms: list[Form], anchor: Tensor, *states: Tensor) -> Any:
        size = sum(form.nbytes for form in forms)
        if line.is_last:
            used = [narrowed(t, form) for t, form in zip(states, forms, strict=True)]
            message = pack(used, anchor.device)
            line.sent += size * (dist.get_world_size(line.group) - 1)
        else:
            message = torch.empty(size, dtype=torch.uint8, device=anchor.device)
        dist.broadcast(message, group=line.group, group_src=line.members[-1])
        ctx.line, ctx.forms, ctx.device = line, forms, anchor.device
        ctx.shapes = [t.shape for t in states]
        made = tuple(unpack(message, forms))
        ctx.mark_non_differentiable(*(t for t in made if not t.is_floating_point()))
        return made

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        found = []
        for grad, form in zip(grads, ctx.forms, strict=True):
            if form.has_gradient:
                total = grad.contiguous()
                dist.reduce(total, group=ctx.line.group, group_dst=ctx.line.members[-1])
                ctx.line.sent += 0 if ctx.line.is_last else form.nbytes
                found.append(total)
            else:
                found.append(None)
        of_anchor = torch.zeros((), device=ctx.device)
        if not ctx.shapes:
            return None, None, of_anchor
        wide = (None if g is None else widened(g, shape) for g, shape in zip(found, ctx.shapes, strict=True))
        return None, None, of_anchor, *wide


class Share(torch.autograd.Function):
    """A value that all ranks have alike to the last bit, with the gradient of this rank's share of it."""

    @staticmethod
    def forward(ctx: Any, share: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None


class Connect(torch.autograd.Function):
    """x, with a gradient of zero for each of some tensors: a backward pass that reaches x reaches them too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *others: Tensor) -> Tensor:
        ctx.others = [(t.shape, t.dtype, t.device) if t.is_floating_point() else None for t in others]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        zeros = (None if o is None else torch.zeros(o[0], dtype=o[1], device=o[2]) for o in ctx.others)
        return grads[0], *zeros
