"""Where documents begin and rows end in a piece, and how to cut such a piece into equal strips.

Every op treats a row as a run of segments: the continued document of the entry state first, if there is one, then each
document that starts inside the piece. Cutting every segment into strips of one size turns ragged, packed rows into one
dense tensor whose strips depend on each other only along a segment, so that nothing can leak between documents.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Boundaries:
    """Document starts and row lengths of a piece of shape (B, L), both on the CPU.

    Args:
        starts: (B, L) bool, True at the first token of each document that starts inside the piece; None for nowhere.
        lengths: (B,) int64, valid tokens of each row, the rest of the row being padding; None for all.
    """

    starts: Tensor | None = None
    lengths: Tensor | None = None

    def valid(self, length: int) -> Tensor:
        """(B, L) bool, False at padding."""
        if self.lengths is None:
            assert self.starts is not None
            return torch.ones_like(self.starts)
        return torch.arange(length) < self.lengths[:, None]

    def since_start(self, entry: Tensor, length: int) -> Tensor:
        """Tokens before each token in its document.

        Args:
            entry: (B,) int64, tokens of the continued document before the piece.
            length: L.

        Returns:
            (B, L) int64 on the CPU.
        """
        steps, begin = torch.arange(length), -entry[:, None]
        if self.starts is not None:  # no `where` over sums of `entry`: inductor gets it wrong for processors with AVX2
            begin = torch.maximum(begin, torch.where(self.starts, steps, torch.iinfo(torch.int64).min).cummax(1).values)
        return steps - begin

    def exit_position(self, entry: Tensor, length: int) -> Tensor:
        """(B,) int64: tokens of the last document of each row up to the end of the piece."""
        if self.starts is None:
            return entry + (length if self.lengths is None else self.lengths)
        lengths = torch.full_like(entry, length) if self.lengths is None else self.lengths
        if length == 0:
            return entry
        last = self.since_start(entry, length).gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] + 1
        return torch.where(lengths > 0, last, entry)


@dataclass(frozen=True)
class Padding:
    """Padding anywhere in the rows of a piece of shape (B, L), to be moved to their ends, where causality hides it.

    Attributes:
        lengths: (B,) int64 on the CPU, tokens of each row without it.
        order: (B, L) int64, where each column of a row comes from once its padding is at the end.
        width: of the longest row; in a graph, which has one, that of the piece.
    """

    lengths: Tensor
    order: Tensor
    width: int

    @classmethod
    def of(cls, mask: Tensor) -> "Padding":
        """From (B, L) bool, False at padding."""
        lengths, order = mask.sum(1).cpu(), (~mask).to(torch.int8).argsort(dim=1, stable=True)
        longest = 0 if not mask.numel() else mask.shape[1] if torch.compiler.is_compiling() else int(lengths.max())
        return cls(lengths, order, longest)

    def remove(self, t: Tensor) -> Tensor:
        """(B, L, ...) to (B, width, ...), with padding only at the ends of rows that are shorter than the longest."""
        order = self.order.view(*self.order.shape, *(1,) * (t.dim() - 2))
        return t.gather(1, order.expand(*self.order.shape, *t.shape[2:]))[:, : self.width]

    def restore(self, x: Tensor) -> Tensor:
        """(B, width, D) to (B, L, D), every token back where it was."""
        x = F.pad(x, (0, 0, 0, self.order.shape[1] - x.shape[1]))
        return x.gather(1, self.order.argsort(1)[..., None].expand(-1, -1, x.shape[-1]))


def lay_out(mask: Tensor | None, starts: Tensor | None) -> tuple[Padding | None, Boundaries | None]:
    """How a piece is computed: what moves its padding away, and its boundaries then.

    Args:
        mask: (B, L) bool, False at padding; None for none.
        starts: (B, L) bool, True at the first token of each document; None for nowhere.
    """
    padding = None if mask is None else Padding.of(mask)
    if padding is not None and starts is not None:
        starts = padding.remove(starts)
    lengths = None if padding is None else padding.lengths
    if starts is None and (padding is None or not _shorter(padding.lengths, padding.width)):
        return padding, None
    return padding, Boundaries(None if starts is None else starts.cpu().contiguous(), lengths)  # one layout, one graph


def _shorter(lengths: Tensor, length: int) -> bool:
    """Whether there is padding; in a graph, where nobody looks, there may be."""
    return torch.compiler.is_compiling() or bool((lengths < length).any())


@dataclass(frozen=True)
class Strips:
    """A piece of shape (B, L) cut into M strips of T slots; every field is on the device of the piece.

    A strip holds tokens of one segment. Strips of a segment follow each other; segments of a row too.
    """

    index: Tensor | None  # (M, T) token b * L + t in each slot, -1 for an empty slot; None: rows cut evenly
    slot_of: Tensor | None  # (B, L) slot m * T + s of each token, -1 for padding; None as above
    first: Tensor  # (M,) bool, the strip begins its segment
    carries: Tensor  # (M,) bool, the strip begins a segment that continues the entry state
    row: Tensor  # (M,)
    segment: Tensor  # (M,)
    last: Tensor  # (B,) last strip of each row, -1 for a row without tokens
    used: Tensor  # (B,) slots up to and with the last token of the row in its last strip
    size: int
    longest: int  # strips in the longest segment, or more
    shape: tuple[int, int]

    def gather(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (M, T, ...), zero in empty slots."""
        batch, length = self.shape
        if self.index is None:
            padding = -length % self.size
            if padding:
                x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, padding))
            return x.reshape(-1, self.size, *x.shape[2:])
        return take(x.reshape(batch * length, *x.shape[2:]), self.index)

    def scatter(self, y: Tensor) -> Tensor:
        """(M, T, ...) to (B, L, ...), zero at padding."""
        batch, length = self.shape
        if self.slot_of is None:
            return y.reshape(batch, -1, *y.shape[2:])[:, :length]
        return take(y.reshape(-1, *y.shape[2:]), self.slot_of)

    def tail(self, x: Tensor) -> Tensor:
        """(B, T, ...): the tokens of each row's last strip moved to the end of the strip, zeros before them."""
        strips = self.gather(x)
        slots = torch.arange(self.size, device=x.device) - (self.size - self.used)[:, None]
        index = torch.where((slots >= 0) & (self.last >= 0)[:, None], self.last[:, None] * self.size + slots, -1)
        return take(strips.reshape(-1, *strips.shape[2:]), index)

    def carry(self, totals: Tensor, entry: Tensor | None, decay: Tensor | None = None) -> Tensor:
        """State at the entry of each strip: e_m = decay * e_{m-1} + totals_{m-1} inside a segment.

        Args:
            totals: (M, ...), what each strip adds to a state that was zero at its entry.
            entry: (B, ...) state at the entry of the piece, or None for zero.
            decay: (...) factor over one whole strip, or None for 1.

        Returns:
            (M, ...), by recursive doubling in log2(longest segment) steps.
        """
        shape = (-1,) + (1,) * (totals.dim() - 1)
        state = torch.cat([torch.zeros_like(totals[:1]), totals[:-1]])
        state = torch.where(self.first.view(shape), torch.zeros_like(state), state)
        if entry is not None:
            state = state + torch.where(self.carries.view(shape), entry[self.row], torch.zeros_like(state))
        step = 1
        while step < self.longest:
            same = (self.segment[step:] == self.segment[:-step]).view(shape)
            before = state[:-step] if decay is None else decay * state[:-step]
            state = torch.cat([state[:step], state[step:] + torch.where(same, before, torch.zeros_like(before))])
            step *= 2
            if decay is not None:
                decay = decay * decay
        return state


def take(x: Tensor, index: Tensor) -> Tensor:
    """x[index] along the first dimension, zero where index is negative."""
    taken = x[index.clamp(min=0)]
    return torch.where((index >= 0).view(*index.shape, *(1,) * (x.dim() - 1)), taken, torch.zeros_like(taken))


def _size(segments: Tensor, most: int) -> int:
    """Slots in a strip for segments of these lengths: halved from `most` while that saves four slots of ten."""
    size = most
    while size > 1:
        slots, fewer = (int((-(-segments // n)).sum()) * n for n in (size, (size + 1) // 2))
        if fewer > 0.6 * slots:
            break
        size = (size + 1) // 2
    return size


def cut_into_strips(
    batch: int,
    length: int,
    most: int,
    boundaries: Boundaries | None,
    device: torch.device,
) -> Strips:
    """Cut a piece into strips of one size, aligned to the start of each segment.

    Args:
        batch: B.
        length: L, at least 1.
        most: slots in a strip; fewer where short segments would leave much of it empty, but not in a graph of
            torch.compile, where no value may decide a size.
        boundaries: of the piece.
        device: where the result lives.
    """
    size = min(most, length)
    if boundaries is None:
        per_row = -(-length // size)
        row = torch.arange(batch, device=device).repeat_interleave(per_row)
        first = (torch.arange(batch * per_row, device=device) % max(per_row, 1)) == 0
        last = torch.arange(1, batch + 1, device=device) * per_row - 1
        used = torch.full((batch,), length - (per_row - 1) * size, device=device)
        return Strips(None, None, first, first, row, row, last, used, size, per_row, (batch, length))

    lengths = torch.full((batch,), length) if boundaries.lengths is None else boundaries.lengths
    steps = torch.arange(length)
    valid = steps < lengths[:, None]
    started = torch.zeros_like(valid) if boundaries.starts is None else boundaries.starts & valid
    begins = started | (valid & (steps == 0))
    since = steps - torch.where(begins, steps, 0).cummax(1).values  # place of each token in its segment
    longest = length
    if not torch.compiler.is_compiling():
        ends = valid & ~F.pad((valid & ~begins)[:, 1:], (0, 1))
        size = _size(since[ends] + 1, size)
        longest = int(torch.where(valid, since + 1, 0).max())

    opens = valid & (since % size == 0)
    if torch.compiler.is_compiling():
        opens[0, 0] = True  # at least one strip, if an empty one: a graph with gradients must know that there is one
    (heads,) = opens.flatten().nonzero(as_tuple=True)  # the token that begins each strip
    if torch.compiler.is_compiling():
        torch._check(len(heads) > 0)
    slot_of = torch.where(valid, (opens.flatten().cumsum(0).view_as(since) - 1) * size + since % size, -1)
    slots = torch.arange(len(heads))[:, None] * size + torch.arange(size)
    tokens = (heads[:, None] + torch.arange(size)).clamp(max=batch * length - 1)
    first = since.flatten()[heads] == 0
    end = slot_of.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0]
    return Strips(
        index=torch.where(slot_of.flatten()[tokens] == slots, tokens, -1).to(device),
        slot_of=slot_of.to(device),
        first=first.to(device),
        carries=(first & ~started.flatten()[heads]).to(device),
        row=(heads // length).to(device),
        segment=begins.flatten().cumsum(0)[heads].to(device),
        last=torch.where(lengths > 0, end // size, -1).to(device),
        used=torch.where(lengths > 0, end % size + 1, 0).to(device),
        size=size,
        longest=-(-longest // size),
        shape=(batch, length),
    )
