"""The states of rows as compiled steps change them in place, and the way into and out of a State."""

import weakref
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..model.megalodon import Megalodon
from ..ops.cpu.decoding_parts import LayerRows, MemoryRows, Sizes, Statistics
from ..ops.cpu.simd import as_numpy
from ..state import State, StatefulModel
from .decoding_places import DecodingPlaces
from .decoding_states import AverageRows, CacheRows, MemoryPartRows, StatisticsRows

_PARTS: dict[str, Any] = {
    "norm": StatisticsRows,
    "cema": AverageRows,
    "attention": CacheRows,
    "memory": MemoryPartRows,
}


class DecodingRows:
    """Room for the states of a number of rows. Each lies in a slot of its own, and knows nothing of its neighbours.

    Args:
        model: whose states they are.
        sizes: of the model.
        num_rows: slots.
        dtype: of the caches, float32 or bf16.
    """

    def __init__(self, model: Megalodon, sizes: Sizes, num_rows: int, dtype: torch.dtype):
        self._model: weakref.ref[StatefulModel] = weakref.ref(model)
        self._spec, given = model.state_spec, (sizes, num_rows, dtype)
        first: Any = model.layers[0]
        self.places = DecodingPlaces(sizes, first.mega.attention.rope_base, num_rows)
        self._position = torch.from_numpy(self.places.position)
        self._norm = StatisticsRows(self._spec["norm"], *given)
        self._layers: list[dict[str, Any]] = [
            {name: _PARTS[name](part, *given) for name, part in spec.items()} for spec in self._spec["layers"]
        ]
        self.norm: Statistics = _flat(self._norm.rows)
        self.layers = [_layer_rows(parts) for parts in self._layers]
        self.memories: list[MemoryRows] = [_flat(parts["memory"].rows) for parts in self._layers if "memory" in parts]

    @torch.no_grad()
    def enter(self, state: State, first: int = 0) -> None:
        """Copy the rows of a state into the slots from `first` on."""
        slots = slice(first, first + state.batch_size)
        for parts, layer in zip(self._layers, state.parts["layers"], strict=True):
            for name, part in parts.items():
                part.enter(layer[name], slots, state.position)
        self._norm.enter(state.parts["norm"], slots, state.position)
        self._position[slots] = state.position

    def advance(self) -> None:
        """Count one token more in each row; where it ended a chunk, the memories absorb that."""
        self.places.position += 1
        if self.memories:
            for row in np.flatnonzero(self.places.position % self.places.chunk_size == 0):
                self._absorb(int(row), int(self.places.position[row]))

    def _absorb(self, row: int, position: int) -> None:
        for parts in self._layers:
            values = parts["attention"].rows[1][row]  # (chunks, c, H, dv)
            parts["memory"].absorb(row, position, values[(position // self.places.chunk_size - 1) % len(values)])

    def state(self) -> State:
        """A copy of all, as the model takes it."""
        position = self._position.clone()
        layers = tuple({name: part.leave(position) for name, part in parts.items()} for parts in self._layers)
        parts = {"layers": layers, "norm": self._norm.leave(position), "position": position}
        return State(parts, self._spec, self._model)


def _layer_rows(parts: dict[str, Any]) -> LayerRows:
    """As kernels take it; parts that a block lacks are empty, and not looked at."""
    nothing = (torch.zeros(0, dtype=dtype) for dtype in (torch.int64, torch.float64, torch.float64))
    norm = parts["norm"].rows if "norm" in parts else Statistics(*nothing)
    cema = parts["cema"].rows if "cema" in parts else torch.zeros(0)
    return _flat(LayerRows(norm, cema, *parts["attention"].rows))


def _flat(part: Any) -> Any:
    """The memory of tensors in tuples, as kernels take it."""
    return as_numpy(part).reshape(-1) if isinstance(part, Tensor) else type(part)(*map(_flat, part))
