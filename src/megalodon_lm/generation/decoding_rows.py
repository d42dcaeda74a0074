"""The states of rows as compiled steps change them in place, and the way into and out of a State."""

import weakref
from typing import Any

import torch
from torch import Tensor

from ..model.decoder import Megalodon
from ..ops.chunk_attention import KeyValueCache
from ..ops.cpu.decoding_kernels import LayerRows, Sizes, Statistics
from ..ops.cpu.simd import as_numpy
from ..ops.timestep_norm import NormState
from ..state import State, StatefulModel


class DecodingRows:
    """Room for the states of a number of rows. Each lies in a slot of its own, and knows nothing of its neighbours.

    Args:
        model: whose states they are.
        sizes: of the model.
        num_rows: slots.
        dtype: of the attention cache, float32 or bf16.
    """

    def __init__(self, model: Megalodon, sizes: Sizes, num_rows: int, dtype: torch.dtype):
        self._model: weakref.ref[StatefulModel] = weakref.ref(model)
        self._spec = model.state_spec
        self.num_rows = num_rows
        self.position = torch.zeros(num_rows, dtype=torch.int64)
        self._layers = [_empty_layer(sizes, num_rows, dtype) for _ in model.layers]
        self._norm = _empty_statistics(sizes, num_rows)
        self.layers: list[LayerRows] = [_flat(layer) for layer in self._layers]
        self.norm: Statistics = _flat(self._norm)

    @torch.no_grad()
    def enter(self, state: State, first: int = 0) -> None:
        """Copy the rows of a state into the slots from `first` on."""
        slots = slice(first, first + state.batch_size)
        for rows, layer in zip(self._layers, state.parts["layers"], strict=True):
            cema, cache = layer["cema"], layer["attention"]
            _enter_norm(rows.norm, layer["norm"], slots)
            rows.cema[slots, ..., : cema.shape[2]] = cema.transpose(2, 3)
            rows.fill[slots] = cache.fill
            used = int(cache.fill.max()) if state.batch_size else 0
            rows.keys[slots, :used] = cache.keys[:, :used]
            rows.values[slots, :used] = cache.values[:, :used]
        _enter_norm(self._norm, state.parts["norm"], slots)
        self.position[slots] = state.position

    def state(self) -> State:
        """A copy of all, as the model takes it."""
        layers = []
        for rows, spec in zip(self._layers, self._spec["layers"], strict=True):
            used = (torch.arange(rows.keys.shape[1]) < rows.fill[:, None])[..., None, None]
            keys, values = (torch.where(used, t, 0) for t in (rows.keys, rows.values))
            cema = rows.cema[..., : spec["cema"].shape[1]].transpose(2, 3).clone(memory_format=torch.contiguous_format)
            cache = KeyValueCache(keys, values, rows.fill.clone())
            layers.append({"norm": _norm_state(rows.norm), "cema": cema, "attention": cache})
        parts = {"layers": tuple(layers), "norm": _norm_state(self._norm), "position": self.position.clone()}
        return State(parts, self._spec, self._model)


def _empty_layer(sizes: Sizes, num_rows: int, dtype: torch.dtype) -> LayerRows:
    keys, values = (
        torch.zeros(num_rows, sizes.chunk_size, sizes.num_heads, width, dtype=dtype)
        for width in (sizes.z_head_dim, sizes.value_head_dim)
    )
    cema = torch.zeros(num_rows, sizes.model_dim, 2, sizes.cema_ndim)
    return LayerRows(_empty_statistics(sizes, num_rows), cema, keys, values, torch.zeros(num_rows, dtype=torch.int64))


def _empty_statistics(sizes: Sizes, num_rows: int) -> Statistics:
    mean, var = (torch.zeros(num_rows, sizes.num_groups, dtype=torch.float64) for _ in range(2))
    return Statistics(torch.zeros(num_rows, dtype=torch.int64), mean, var)


def _flat(part: Any) -> Any:
    """The memory of tensors in tuples, as kernels take it."""
    return as_numpy(part).reshape(-1) if isinstance(part, Tensor) else type(part)(*map(_flat, part))


def _enter_norm(rows: Statistics, norm: NormState, slots: slice) -> None:
    for to, t in zip(rows, norm, strict=True):
        to[slots] = t


def _norm_state(rows: Statistics) -> NormState:
    return NormState(*(t.clone() for t in rows))
