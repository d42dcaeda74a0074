"""State: everything that crosses a cut in a sequence, as one value of fixed size.

A sequence may be cut anywhere, to stream it, to train on it in steps, to spread it over ranks or to pause it for a
month, and the result is the same: `logits, state = model(tokens, state)`.
"""

import dataclasses
import hashlib
import json
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import InputError
from .files import write_atomically
from .ops.chunk_attention import KeyValueCache
from .ops.device import check_memory
from .ops.timestep_norm import NormState, empty_norm_state

if TYPE_CHECKING:
    from .config import ModelConfig
    from .model.decoder import Megalodon

FORMAT, OLDER_FORMAT = "megalodon-state-3", "megalodon-state-2"
TOKENS = "tokens"


class LayerState(NamedTuple):
    """What one block carries: running norm statistics, CEMA states (B, D, N, 2), and the unfinished chunk."""

    norm: NormState
    cema: Tensor
    attention: KeyValueCache


@dataclass(frozen=True, eq=False)
class State:
    """The state of B sequences after some tokens.

    Attributes:
        layers: one LayerState a block.
        norm: statistics of the final norm.
        position: (B,) int64 on the CPU, tokens read since each row's document began.
        model: weak reference to the model that made it; None once moved to another process.
    """

    layers: tuple[LayerState, ...]
    norm: NormState
    position: Tensor
    model: "weakref.ref[Megalodon] | None" = None

    @classmethod
    def empty(
        cls,
        config: "ModelConfig",
        batch: int = 1,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "State":
        """The state before the first token.

        Args:
            config: of the model.
            batch: rows.
            device: of everything but positions.
            dtype: of the cached keys and values; CEMA states are float32 or better.
        """
        device = torch.device(device)
        nbytes = config.state_bytes(batch, dtype.itemsize)
        check_memory(nbytes, device, f"a state of {batch} rows", f"chunk_size = {config.chunk_size} decides its size")
        heads, c = config.num_heads, config.chunk_size
        precise = torch.promote_types(dtype, torch.float32)

        def layer() -> LayerState:
            keys = torch.zeros(batch, c, heads, config.z_dim // heads, device=device, dtype=dtype)
            values = torch.zeros(batch, c, heads, config.value_dim // heads, device=device, dtype=dtype)
            return LayerState(
                empty_norm_state(batch, config.norm_num_groups, device),
                torch.zeros(batch, config.model_dim, config.cema_ndim, 2, device=device, dtype=precise),
                KeyValueCache(keys, values, torch.zeros(batch, dtype=torch.int64)),
            )

        layers = tuple(layer() for _ in range(config.num_layers))
        norm = empty_norm_state(batch, config.norm_num_groups, device)
        return cls(layers, norm, torch.zeros(batch, dtype=torch.int64))

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.position)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; independent of how much was read."""
        return sum(t.nbytes for t in self.tensors().values())

    def __repr__(self) -> str:
        places = sorted(set(self.position.tolist()))
        position = ", ".join(f"{p:,}" for p in (places if len(places) < 5 else (places[0], places[-1])))
        if len(places) > 4:
            position = position.replace(", ", " to ")
        maker = self.model() if self.model is not None else None
        made = "an unknown model" if maker is None else maker.summary
        size = f"{self.nbytes / 1e6:.1f} MB on {self.norm.mean.device}"
        rows = "1 row" if self.batch_size == 1 else f"{self.batch_size} rows"
        return f"<State of {rows} at position {position}, {size}, made by {made}>"

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor under its name."""
        return dict(_named(self))

    def used(self) -> dict[str, Tensor]:
        """As tensors, but of the unfinished chunk only the slots that some row uses."""
        longest = int(self.layers[0].attention.fill.max()) if self.batch_size else 0
        return {name: t[:, :longest] if is_cache(name) else t for name, t in _named(self)}

    def map(self, change: Callable[[Tensor], Tensor]) -> "State":
        """The state with `change` applied to every tensor; rows are the first dimension of each."""
        layers, norm, position = (_rebuild(part, change) for part in (self.layers, self.norm, self.position))
        return State(layers, norm, position, self.model)

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
        columns = [s.tensors() for s in states]
        shapes = [{name: t.shape[1:] for name, t in column.items()} for column in columns]
        if any(s != shapes[0] for s in shapes):
            raise InputError("State.cat got states of different models; their shapes differ")
        joined = iter([torch.cat([c[name] for c in columns]) for name in columns[0]])
        known = next((s.model for s in states if s.model is not None and s.model() is not None), None)
        return dataclasses.replace(states[0].map(lambda _: next(joined)), model=known)

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
        """Move to a device; change the type of the cached keys and values.

        Statistics and CEMA states keep their precision, and positions stay on the CPU.
        """

        def move(path: str, t: Tensor) -> Tensor:
            if _on_cpu(path):
                return t
            cast = dtype if path.endswith(("keys", "values")) else None
            return t.to(device=device, dtype=cast)

        moved = iter([move(name, t) for name, t in _named(self)])
        return self.map(lambda _: next(moved))

    def check(self, model: "Megalodon", batch: int) -> None:
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
        expected = State.empty(model.config, 1, "meta").tensors()
        found = self.tensors()
        for name in expected.keys() | found.keys():
            shapes = [tuple(t[name].shape[1:]) if name in t else None for t in (found, expected)]
            if shapes[0] != shapes[1]:
                raise InputError(
                    f"the state belongs to another model: {name} has shape {shapes[0]} a row and this model needs "
                    f"{shapes[1]}; start from an empty state"
                )
        if maker is not None and maker.fingerprint() != model.fingerprint():
            raise InputError(
                "the state belongs to another model of the same shape: its weights or its configuration differ; start "
                "from an empty state"
            )

    def save(self, path: str | Path, model: "Megalodon | None" = None) -> None:
        """Write as safetensors, atomically, with the fingerprint of its model and a checksum.

        Only used slots of the unfinished chunk are stored.

        Args:
            path: of the file.
            model: the model it belongs to; needed only if the model that made the state is gone.
        """
        model = model or (self.model() if self.model is not None else None)
        if model is None:
            raise InputError("the model of this state is gone; call state.save(path, model)")
        StateFile(self, model.fingerprint()).write(path)

    @classmethod
    def load(cls, path: str | Path, model: "Megalodon") -> "State":
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
        return file.state_for(model, path)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "model": None}


@dataclass(frozen=True, eq=False)
class StateFile:
    """What a file holds: a bare state, or a bookmark.

    Attributes:
        state: on the CPU, its cache cut to the used slots until it is given to a model.
        fingerprint: of the model.
        tokens: int64, read but not yet in the state; none for a bare state, see generation.context.
        notes: strings by name, such as the date.
        sampled: whether the fingerprint is that of the older format, of a sample of the weights.
    """

    state: State
    fingerprint: str
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    notes: dict[str, str] = field(default_factory=dict)
    sampled: bool = False

    @property
    def is_bookmark(self) -> bool:
        """Whether it is a context that was kept, and no bare state."""
        return "tokenizer" in self.notes

    def write(self, path: str | Path) -> None:
        """Write atomically."""
        state = self.state
        stored = {n: t.detach().cpu().contiguous() for n, t in state.used().items()}
        stored = {n: t.clone() for n, t in stored.items()} | {TOKENS: self.tokens}
        metadata = {
            **self.notes,
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "position": json.dumps(state.position.tolist()),
        }
        write_atomically(path, save(stored, {**metadata, "checksum": _checksum(stored, metadata)}))

    @classmethod
    def read(cls, path: str | Path) -> "StateFile":
        """Read and check a file.

        Raises:
            InputError: missing, truncated or altered.
        """
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise InputError(f"no state file at {path}") from None
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path} is not a readable state file ({error}); it may be truncated") from None
        if metadata.get("format") not in (FORMAT, OLDER_FORMAT):
            raise InputError(f"{path} is not a state file of this version (it says {metadata.get('format')!r})")
        if metadata.pop("checksum", None) != _checksum(stored, metadata):
            raise InputError(f"{path} was altered after it was written: its checksum does not match")
        tokens = stored.pop(TOKENS)
        notes = {name: metadata[name] for name in metadata.keys() - {"format", "fingerprint", "position"}}
        sampled = metadata["format"] == OLDER_FORMAT
        return cls(from_tensors(stored), metadata["fingerprint"], tokens, notes, sampled)

    def state_for(self, model: "Megalodon", path: str | Path = "the file") -> State:
        """The state, on the device of its model.

        Raises:
            InputError: the state belongs to another model.
        """
        if self.fingerprint != (model.sampled_fingerprint() if self.sampled else model.fingerprint()):
            raise InputError(f"{path} is a state of another model or of other weights; read the text again")
        state = dataclasses.replace(filled_up(self.state, model.config), model=weakref.ref(model))
        return state.to(next(model.parameters()).device)


def from_tensors(stored: dict[str, Tensor]) -> State:
    """The inverse of State.tensors; the state knows no model."""

    def norm(prefix: str) -> NormState:
        return NormState(*(stored[f"{prefix}.{name}"] for name in NormState._fields))

    def layer(prefix: str) -> LayerState:
        cache = KeyValueCache(*(stored[f"{prefix}.attention.{name}"] for name in KeyValueCache._fields))
        return LayerState(norm(f"{prefix}.norm"), stored[f"{prefix}.cema"], cache)

    count = sum(name.endswith(".cema") for name in stored)
    return State(tuple(layer(f"layers.{i}") for i in range(count)), norm("norm"), stored["position"])


def _named(state: State) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(state.layers):
        yield from ((f"layers.{i}.norm.{n}", t) for n, t in zip(layer.norm._fields, layer.norm, strict=True))
        yield f"layers.{i}.cema", layer.cema
        cache = layer.attention
        yield from ((f"layers.{i}.attention.{n}", t) for n, t in zip(cache._fields, cache, strict=True))
    yield from ((f"norm.{n}", t) for n, t in zip(state.norm._fields, state.norm, strict=True))
    yield "position", state.position


def _rebuild(part: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples of tensors with every tensor changed, in the order of _named."""
    if isinstance(part, Tensor):
        return change(part)
    items = (_rebuild(p, change) for p in part)
    return type(part)(*items) if hasattr(part, "_fields") else tuple(items)


def _on_cpu(name: str) -> bool:
    return name.endswith("fill") or name == "position"


def is_cache(name: str) -> bool:
    """Whether a tensor of this name holds keys or values of the unfinished chunk."""
    return name.endswith(("attention.keys", "attention.values"))


def filled_up(state: State, config: "ModelConfig") -> State:
    """A state of a model of this configuration, made of tensors from State.used, with all slots of the chunk again."""
    template = iter(State.empty(config, state.batch_size, "meta").tensors().items())

    def fill_up(stored: Tensor) -> Tensor:
        name, whole = next(template)
        if not is_cache(name):
            return stored
        full = stored.new_zeros(whole.shape)
        full[:, : stored.shape[1]] = stored
        return full

    return state.map(fill_up)


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()
