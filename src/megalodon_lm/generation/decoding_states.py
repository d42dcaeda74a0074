"""What each part of a block carries, as compiled steps change it in place: memory for a number of rows.

All parts have the same interface: `enter` copies the states of some rows into slots, `leave` copies those of all rows
out; `position` says how many tokens of its document each row has read. `rows` is what kernels are given, as tensors.
"""

from typing import Any, Protocol

import torch
from torch import Tensor

from ..ops.adaptive_memory import MemoryState, absorb
from ..ops.chunk_attention import KeyValueCache
from ..ops.cpu.decoding_parts import MemoryRows, Sizes, Statistics
from ..ops.sliding_attention import SlidingCache
from ..ops.timestep_norm import NormState
from ..state_spec import Tree


class PartRows(Protocol):
    """The states of one part."""

    def enter(self, state: Any, slots: slice, position: Tensor) -> None:
        """Copy the states of rows that have read so much into slots."""

    def leave(self, position: Tensor) -> Tree:
        """A copy of all, as the part takes it."""


class StatisticsRows:
    """Of a norm over time."""

    def __init__(self, spec: Any, sizes: Sizes, num_rows: int, dtype: torch.dtype):
        mean, var = (torch.zeros(num_rows, sizes.num_groups, dtype=torch.float64) for _ in range(2))
        self.rows = Statistics(torch.zeros(num_rows, dtype=torch.int64), mean, var)

    def enter(self, state: NormState, slots: slice, position: Tensor) -> None:
        for to, t in zip(self.rows, state, strict=True):
            to[slots] = t

    def leave(self, position: Tensor) -> NormState:
        return NormState(*(t.clone() for t in self.rows))


class AverageRows:
    """Of CEMA; where states do not turn, their imaginary parts stay 0."""

    def __init__(self, spec: Any, sizes: Sizes, num_rows: int, dtype: torch.dtype):
        _, self._ndim, self._parts = spec.shape
        self.rows = torch.zeros(num_rows, sizes.model_dim, 2, sizes.cema_ndim)

    def enter(self, state: Tensor, slots: slice, position: Tensor) -> None:
        self.rows[slots, :, : self._parts, : self._ndim] = state.transpose(2, 3)

    def leave(self, position: Tensor) -> Tensor:
        used = self.rows[:, :, : self._parts, : self._ndim].transpose(2, 3)
        return used.clone(memory_format=torch.contiguous_format)


class CacheRows:
    """Keys and values of attention, (B, chunks, c, H, d).

    The chunks of a document take turns, so that nothing moves when one ends: the next takes the place of the oldest.
    """

    def __init__(self, spec: Any, sizes: Sizes, num_rows: int, dtype: torch.dtype):
        self._sliding = sizes.num_chunks > 1
        self.rows = tuple(
            torch.zeros(num_rows, sizes.num_chunks, sizes.chunk_size, sizes.num_heads, width, dtype=dtype)
            for width in (sizes.z_head_dim, sizes.value_head_dim)
        )

    def enter(self, state: KeyValueCache | SlidingCache, slots: slice, position: Tensor) -> None:
        for row, (fill, slot) in enumerate(zip(state.fill.tolist(), range(slots.start, slots.stop), strict=True)):
            places = self._places(int(position[row]), fill)
            for to, t in zip(self.rows, (state.keys, state.values), strict=True):
                to[slot].flatten(0, 1)[places] = t[row, :fill].to(to.dtype)

    def leave(self, position: Tensor) -> KeyValueCache | SlidingCache:
        size = self.rows[0].shape[2]
        fill = position % size
        if self._sliding:
            fill = torch.where(position < size, position, size + fill)
        copies = [torch.zeros_like(t).flatten(1, 2) for t in self.rows]
        for row, used in enumerate(fill.tolist()):
            places = self._places(int(position[row]), used)
            for to, t in zip(copies, self.rows, strict=True):
                to[row, :used] = t[row].flatten(0, 1)[places]
        keys, values = copies
        return (
            SlidingCache(keys, values, fill, position.clone()) if self._sliding else KeyValueCache(keys, values, fill)
        )

    def _places(self, position: int, count: int) -> Tensor:
        """Of the last tokens of a document."""
        _, chunks, size, *_ = self.rows[0].shape
        return torch.arange(position - count, position) % (chunks * size)


class MemoryPartRows:
    """Of the adaptive memory."""

    def __init__(self, spec: Any, sizes: Sizes, num_rows: int, dtype: torch.dtype):
        heads, dk, dv = sizes.num_heads, sizes.z_head_dim, sizes.value_head_dim
        self.rows = MemoryRows(
            torch.zeros(num_rows, sizes.chunk_size, heads, dk, dtype=dtype),
            torch.zeros(num_rows, sizes.num_chunks, heads, dk, dv),
        )
        self._log_sum = torch.zeros(num_rows, heads, dk, dtype=torch.float64)

    def enter(self, state: MemoryState, slots: slice, position: Tensor) -> None:
        self.rows.keys[slots], self.rows.memory[slots], self._log_sum[slots] = state.keys, state.memory, state.log_sum

    def leave(self, position: Tensor) -> MemoryState:
        size = self.rows.keys.shape[1]
        fill = position % size
        used = (torch.arange(size) < fill[:, None])[..., None, None]
        keys = torch.where(used, self.rows.keys, 0)
        return MemoryState(keys, fill, self.rows.memory.clone(), self._log_sum.clone(), position // size)

    def absorb(self, row: int, position: int, values: Tensor) -> None:
        """Absorb the chunk that the last token of a row has ended, whose values (c, H, dv) attention still holds."""
        keys, memory = (t[row : row + 1] for t in self.rows)
        before = torch.tensor([position // keys.shape[1] - 1])
        own = self._log_sum[row : row + 1]
        new, own[:] = absorb(keys, values[None], memory[:, -1], own, before)
        memory[:, :-1] = memory[:, 1:].clone()
        memory[:, -1] = new
