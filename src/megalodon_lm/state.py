"""State: everything that crosses a cut in a sequence, as one value.

A sequence may be cut anywhere, to stream it, to train on it in steps, to spread it over ranks or to pause it for a
month, and the result is the same: `logits, state = model(tokens, state)`.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .errors import InputError
from .state_file import StateFile
from .state_spec import TensorSpec, Tree, named, tree_map


class StatefulModel(Protocol):
    """What a State needs of the model that makes it and takes it."""

    @property
    def state_spec(self) -> Tree:
        """What it carries, with a `position`: the (B,) int64 tokens read since each row's document began."""

    @property
    def summary(self) -> str:
        """The sizes in a few words."""

    def fingerprint(self) -> str:
        """Identifies the configuration and the weights."""

    def sampled_fingerprint(self) -> str:
        """The same in the older format of files."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """The weights."""


class State:
    """The state of B sequences after some tokens.

    It is no dataclass: in those, as in other plain containers, FSDP2's mixed precision rounds what a module is given.

    Args:
        parts: tree of named parts down to tensors, whose first dimension are the B rows; see state_spec.
        spec: what the layers of the model say of each tensor.
        model: weak reference to the model that made it; None once moved to another process.
    """

    def __init__(self, parts: Tree, spec: Tree, model: "weakref.ref[StatefulModel] | None" = None):
        self.parts, self.spec, self.model = parts, spec, model

    @property
    def position(self) -> Tensor:
        """(B,) int64 on the CPU, tokens read since each row's document began."""
        return self.parts["position"]

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; independent of how much was read."""
        return sum(t.nbytes for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Of everything but what is always on the CPU."""
        tensors = self.tensors()
        return next((tensors[name].device for name, leaf in named(self.spec) if not leaf.on_cpu), torch.device("cpu"))

    def __repr__(self) -> str:
        positions = sorted(set(self.position.tolist()))
        position = ", ".join(f"{p:,}" for p in (positions if len(positions) < 5 else (positions[0], positions[-1])))
        if len(positions) > 4:
            position = position.replace(", ", " to ")
        maker = self.model() if self.model is not None else None
        made = "an unknown model" if maker is None else maker.summary
        size = f"{self.nbytes / 1e6:.1f} MB on {self.device}"
        rows = "1 row" if self.batch_size == 1 else f"{self.batch_size} rows"
        return f"<State of {rows} at position {position}, {size}, made by {made}>"

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name."""
        return dict(named(self.parts))

    def used(self) -> dict[str, Tensor]:
        """As tensors, but of each cache only what some row uses, copied: all that has to be kept."""
        tensors = self.tensors()
        for name, leaf in named(self.spec):
            if leaf.fill:
                fill = tensors[f"{name.rpartition('.')[0]}.{leaf.fill}"]
                tensors[name] = tensors[name][:, : int(fill.max()) if len(fill) else 0].clone()
        return tensors

    def compacted(self) -> "State":
        """The state to keep in memory for later: of each cache only what is used; no model takes it."""
        tensors = iter(self.used().values())
        return State(tree_map(lambda _: next(tensors), self.spec), self.spec, self.model)

    def filled_up(self) -> "State":
        """What `compacted` was made of, in full length again."""
        return State(tree_map(_filled_up, self.parts, self.spec), self.spec, self.model)

    @classmethod
    def from_tensors(cls, stored: Mapping[str, Tensor], model: StatefulModel, spec: Tree | None = None) -> "State":
        """The state of a model from `tensors` or `used`.

        Args:
            stored: by name.
            model: whose state it is.
            spec: of the state, where it is not the model's as it is here.

        Raises:
            InputError: the tensors are those of another model.
        """
        spec = model.state_spec if spec is None else spec
        whole = {name: _filled_up(stored[name], leaf) for name, leaf in named(spec) if name in stored}
        _check_rows({**stored, **whole}, spec)
        tensors = iter(whole.values())
        return cls(tree_map(lambda _: next(tensors), spec), spec, weakref.ref(model))

    def map(self, change: Callable[[Tensor], Tensor]) -> "State":
        """The state with `change` applied to every tensor; rows are the first dimension of each."""
        return State(tree_map(change, self.parts), self.spec, self.model)

    def select(self, rows: Sequence[int] | Tensor) -> "State":
        """Choose, repeat or reorder rows; `state.select([0] * 8)` forks a conversation eight times.

        Args:
            rows: numbers of rows, or a bool for each row.

        Raises:
            InputError: no such row.
        """
        index = torch.as_tensor(rows)
        if index.dtype == torch.bool and index.shape == self.position.shape:
            index = index.nonzero().squeeze(1)
        elif index.dtype == torch.bool or bool(((index < -self.batch_size) | (index >= self.batch_size)).any()):
            raise InputError(f"rows {index.tolist()} are not all rows of a state that has {self.batch_size}")
        index = index.to(torch.int64)
        return self.map(lambda t: t[index.to(t.device)])

    @staticmethod
    def cat(states: Sequence["State"]) -> "State":
        """Join states of one model along the batch.

        Raises:
            InputError: no state, or states of different models.
        """
        if not states:
            raise InputError("State.cat needs at least one state")
        makers = {id(maker): maker for s in states if s.model is not None and (maker := s.model()) is not None}
        if len({maker.fingerprint() for maker in makers.values()} if len(makers) > 1 else makers) > 1:
            raise InputError("State.cat got states of different models; their weights differ")
        return states[0].joined(states)

    def joined(self, states: Sequence["State"]) -> "State":
        """States of the model of this one, which is the first of them, along the batch; see cat."""
        shapes = [_row_shapes(s.tensors()) for s in states]
        if any(s != shapes[0] for s in shapes):
            raise InputError("State.cat got states of different models; their shapes differ")
        joined = tree_map(lambda *tensors: torch.cat(tensors), *(s.parts for s in states))
        known = next((s.model for s in states if s.model is not None and s.model() is not None), None)
        return State(joined, states[0].spec, known)

    def split(self) -> list["State"]:
        """One state a row."""
        return [self.select([row]) for row in range(self.batch_size)]

    def detach(self) -> "State":
        """Cut the gradient here: truncated back-propagation through time."""
        return self.map(Tensor.detach)

    def clone(self) -> "State":
        """An independent copy, gradients kept."""
        return self.map(Tensor.clone)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "State":
        """Move to a device; change the type of what is cached, such as keys and values.

        Statistics and CEMA states keep their precision, and positions stay on the CPU.
        """

        def move(t: Tensor, leaf: TensorSpec) -> Tensor:
            return t if leaf.on_cpu else t.to(device=device, dtype=dtype if leaf.dtype is None else None)

        return State(tree_map(move, self.parts, self.spec), self.spec, self.model)

    def check(self, model: StatefulModel, batch: int) -> None:
        """Refuse a state that another model made, or that has another number of rows.

        A state whose model is gone is known by its shapes alone.

        Raises:
            InputError: with the first difference.
        """
        if self.batch_size != batch:
            raise InputError(
                f"the state has {self.batch_size} rows but the tokens have {batch}; use state.select to match them"
            )
        maker = self.model() if self.model is not None else None
        if maker is model:
            return
        _check_rows(self.tensors(), model.state_spec)
        if maker is not None and maker.fingerprint() != model.fingerprint():
            raise InputError(
                "the state belongs to another model of the same shape: its weights or its configuration differ; start "
                "from an empty state"
            )

    def save(self, path: str | Path, model: StatefulModel | None = None) -> None:
        """Write as safetensors, atomically, with the fingerprint of its model and a checksum.

        Only what is used of a cache is stored.

        Args:
            path: of the file.
            model: the model it belongs to; needed only if the model that made the state is gone.
        """
        model = model or (self.model() if self.model is not None else None)
        if model is None:
            raise InputError("the model of this state is gone; call state.save(path, model)")
        StateFile(self.used(), model.fingerprint()).write(path)

    @classmethod
    def load(cls, path: str | Path, model: StatefulModel) -> "State":
        """Read a state for this model, onto its device.

        Raises:
            InputError: missing, truncated or altered file, a state of another model, or a bookmark, which holds more.
        """
        file = StateFile.read(path)
        if file.is_bookmark:
            raise InputError(
                f"{path} is a bookmark: a state, and {len(file.tokens)} tokens to read on from it; "
                "load it with Context.load"
            )
        return cls.of_file(file, model, path)

    @classmethod
    def of_file(cls, file: StateFile, model: StatefulModel, path: str | Path) -> "State":
        """The state in a file that was read from a path, for this model, on its device.

        Raises:
            InputError: the state belongs to another model.
        """
        if file.fingerprint != (model.sampled_fingerprint() if file.sampled else model.fingerprint()):
            raise InputError(f"{path} is a state of another model or of other weights; read the text again")
        return cls.from_tensors(file.tensors, model).to(next(model.parameters()).device)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}


def _filled_up(stored: Tensor, leaf: TensorSpec) -> Tensor:
    """A cache of which only what was used is stored, in its full length again."""
    if not leaf.fill or stored.dim() < 2 or stored.shape[1] >= leaf.shape[0]:
        return stored
    full = stored.new_zeros(len(stored), leaf.shape[0], *stored.shape[2:])
    full[:, : stored.shape[1]] = stored
    return full


def _row_shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape[1:]) for name, t in tensors.items()}


def _check_rows(tensors: Mapping[str, Tensor], spec: Tree) -> None:
    """Refuse tensors that are not those of a model's state.

    Raises:
        InputError: with the first difference.
    """
    found, expected = _row_shapes(tensors), {name: leaf.shape for name, leaf in named(spec)}
    for name in {**expected, **found}:
        if found.get(name) != expected.get(name):
            raise InputError(
                f"the state belongs to another model: {name} has shape {found.get(name)} a row and this model needs "
                f"{expected.get(name)}; start from an empty state"
            )
