"""The cache of a model of transformers as a State: a value that can be forked, reordered, joined and kept."""

import copy
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InputError
from ..state import State, StatefulModel
from ..state_spec import Tree, declare

POSITION: Tree = {"position": declare(dtype=torch.int64, on_cpu=True)}
_ATTENTION = (DynamicLayer, DynamicSlidingWindowLayer)  # these make new tensors as they grow, others write into theirs


class TransformersState(State):
    """What a model of transformers has read; it grows with the text.

    Args:
        cache: that of the library; None before the first token.
        valid: (B, columns) bool on the CPU, False at columns of the cache that are padding.
        position: (B,) int64 on the CPU, tokens read.
        model: that made it.
    """

    def __init__(
        self, cache: Cache | None, valid: Tensor, position: Tensor, model: "weakref.ref[StatefulModel] | None"
    ):
        super().__init__({"position": position}, POSITION, model)
        self.cache, self.valid = cache, valid

    @property
    def grows_by_columns(self) -> bool:
        """Whether every layer keeps keys and values of all columns, so that rows of different lengths can be joined."""
        return self.cache is None or all(type(layer) is DynamicLayer for layer in self.cache.layers)

    @property
    def is_recurrent(self) -> bool:
        """Whether no layer keeps columns."""
        return self.cache is not None and all(self.cache.is_linear)

    @property
    def is_forgotten_in_pieces(self) -> bool:
        """Whether a layer is recurrent: the library takes up its state for one token, and drops it for several."""
        return self.cache is not None and any(type(layer) not in _ATTENTION for layer in self.cache.layers)

    @property
    def device(self) -> torch.device:
        """Of the cache."""
        return next((t.device for name, t in self.tensors().items() if name != "position"), torch.device("cpu"))

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name."""
        found = {"position": self.position}
        for number, layer in enumerate(self.cache.layers if self.cache is not None else ()):
            _mapped(vars(layer), lambda t, name: found.setdefault(name, t), f"layers.{number}")
        return found

    def used(self) -> dict[str, Tensor]:
        """As tensors: there is nothing else."""
        return self.tensors()

    def map(self, change: Callable[[Tensor], Tensor]) -> "TransformersState":
        """The state with `change` applied to every tensor; rows are the first dimension of each."""
        cache = _with_tensors(self.cache, lambda t, _: change(t))
        return TransformersState(cache, change(self.valid), change(self.position), self.model)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "TransformersState":
        """Move to a device; the type stays the library's."""
        cache = _with_tensors(self.cache, lambda t, _: t.to(device=device))
        return TransformersState(cache, self.valid, self.position, self.model)

    def advancing(self) -> Cache | None:
        """A cache that the library may write into: what this state holds stays as it is."""
        cache = _with_tensors(self.cache, lambda t, _: t)
        for number, layer in enumerate(cache.layers if cache is not None else ()):
            if type(layer) not in _ATTENTION:
                assert cache is not None
                cache.layers[number] = copy.deepcopy(layer)
        return cache

    def joined(self, states: Sequence["State"]) -> "TransformersState":
        """This state and others along the batch; of rows that read less, columns of padding stand first.

        Raises:
            InputError: of a model whose rows must have read the same number of tokens.
        """
        given = [state for state in states if isinstance(state, TransformersState)]
        assert len(given) == len(states)
        columns = max(state.valid.shape[1] for state in given)
        ragged = any(state.valid.shape[1] != columns for state in given)
        whole = all(state.grows_by_columns for state in given)
        if ragged and not whole and not all(state.is_recurrent for state in given):
            raise InputError(
                "texts of different lengths cannot be continued side by side by this model of transformers; give one "
                "at a time"
            )
        valid = torch.cat([F.pad(s.valid, (columns - s.valid.shape[1], 0)) for s in given])
        position = torch.cat([state.position for state in given])
        if given[0].cache is None:
            return TransformersState(None, valid, position, self.model)
        stored = [state.tensors() for state in given]

        def join(_: Tensor, name: str) -> Tensor:
            rows = [tensors[name] for tensors in stored]
            if whole:
                rows = [F.pad(row, (0, 0, columns - row.shape[2], 0)) for row in rows]
            return torch.cat(rows)

        return TransformersState(_with_tensors(given[0].cache, join), valid, position, self.model)

    def save(self, path: Any, model: Any = None) -> None:
        """Refuse: the library has no files for its caches.

        Raises:
            InputError: always.
        """
        raise InputError("the state of a model of transformers cannot be saved; read the text again")


def _with_tensors(cache: Cache | None, change: Callable[[Tensor, str], Tensor]) -> Cache | None:
    """A cache of the same kind with every tensor of its layers changed; told its name."""
    if cache is None:
        return None
    twin = copy.copy(cache)
    twin.layers = [copy.copy(layer) for layer in cache.layers]
    for number, layer in enumerate(twin.layers):
        vars(layer).update(_mapped(vars(layer), change, f"layers.{number}"))
    return twin


def _mapped(parts: dict[Any, Any], change: Callable[[Tensor, str], Tensor], name: str) -> dict[Any, Any]:
    """The values of a layer with its tensors of rows changed; single numbers stay."""
    found = {}
    for key, value in parts.items():
        if isinstance(value, dict):
            value = _mapped(value, change, f"{name}.{key}")
        elif isinstance(value, Tensor) and value.dim():
            value = change(value, f"{name}.{key}")
        found[key] = value
    return found
