"""Context: what a model has read of one text, so that every way of cutting the text gives bitwise the same.

Rounding depends on how many tokens a matrix product takes at once. So text is always read in the same pieces, counted
from its beginning; tokens of the last, unfinished piece wait, and are all that is computed again when more is read or
written. A bookmark holds the state at the last place where a piece and a chunk end together, and the tokens since. So
it holds of the attention cache only what is used at the end of a chunk: nothing, or with sliding attention the chunk
that ended there.
"""

import weakref
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..files import BOOKMARK, check_writable
from ..model.language_model import Config, LanguageModel
from ..state import State
from ..state_file import StateFile
from ..state_spec import named
from ..training.precision import Precision, autocast, choose_precision
from .scoring import token_losses

MAX_PIECE_LENGTH = 512  # tokens that are read at once; see docs/architecture.md


def unit_length(config: Config) -> int:
    """Tokens after which a piece and a reading unit, such as a chunk, end together."""
    return max(config.reading_unit, MAX_PIECE_LENGTH // config.reading_unit * config.reading_unit)


def piece_length(config: Config) -> int:
    """Tokens in which a model reads: whole reading units, or one that is longer than a piece in even parts."""
    unit = unit_length(config)
    return -(-unit // -(-unit // MAX_PIECE_LENGTH))


class Context:
    """One text, read so far by one model. It grows with `read`, in constant memory.

    Args:
        model: in evaluation mode.
        precision: of the matrix products; see DecodingEngine.
    """

    def __init__(self, model: LanguageModel, precision: Precision = "auto"):
        self.model = model
        self.device = model.device
        self.precision = choose_precision(precision, self.device)
        readers = getattr(model, "ranks", 1)  # that share a piece
        self.unit, self.piece = readers * unit_length(model.config), readers * piece_length(model.config)
        self.scored, self.nats = 0, 0.0
        self._waiting = np.zeros(0, np.int64)
        self._begin_at(model.empty_state(dtype=self._cache_dtype))

    def _begin_at(self, state: State) -> None:
        """Take a state at the end of a chunk for that of all that was read."""
        self._state = state
        self._anchor = state.used()
        self._losses = self.scored, self.nats
        self._since: list[np.ndarray] = []
        self._finished = _Finished()

    @property
    def position(self) -> int:
        """Tokens read."""
        return int(self._state.position) + len(self._waiting)

    @property
    def waiting(self) -> int:
        """Of these, the tokens since the last whole piece: what `finish` computes, and each fork that reads on anew."""
        return len(self._waiting)

    def __repr__(self) -> str:
        loss = f", {self.nats / self.scored:.3f} nats a token" if self.scored else ""
        return f"<Context of {self.position:,} tokens{loss}, {self.nbytes / 1e6:.1f} MB, read by {self.model.summary}>"

    @property
    def last(self) -> int:
        """The token read last; there must be one."""
        return int(self._waiting[-1])

    def loss(self, complete: bool = True) -> float | None:
        """Mean loss of a token in nats; None before one was scored.

        Args:
            complete: of all tokens; otherwise those of the unfinished piece are left out, which costs nothing.
        """
        whole = self.fork() if complete else self
        if complete and len(self._waiting) > 1:
            whole._score(len(self._waiting) - 1)
        return whole.nats / whole.scored if whole.scored else None

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory, however much was read."""
        tokens = self._waiting.nbytes + sum(piece.nbytes for piece in self._since)
        return self._state.nbytes + sum(t.nbytes for t in self._anchor.values()) + tokens

    def read(self, tokens: np.ndarray) -> None:
        """Read on.

        Args:
            tokens: (L,) int64.

        Raises:
            InputError: a token outside the vocabulary, and nothing was read then; or a loss that is not finite.
        """
        self.model.check_tokens(torch.from_numpy(tokens)[None])
        self._waiting = np.concatenate([self._waiting, tokens])
        self._finished = _Finished()
        while len(self._waiting) > (length := self._next_piece()):  # a token after the piece is its last target
            self._state = self._score(length)
            self._since = [*self._since, self._waiting[:length].copy()]
            self._waiting = self._waiting[length:]
            if int(self._state.position) % self.unit == 0:
                self._begin_at(self._state)
        self._waiting = self._waiting.copy()  # let go of what was read

    def _next_piece(self) -> int:
        """Tokens from the state to the end of its piece."""
        done = int(self._state.position) % self.unit
        return min(self.unit, (done // self.piece + 1) * self.piece) - done

    @torch.no_grad()  # not inference mode: its states could never be trained on
    def _score(self, length: int) -> State:
        """The state after some tokens that wait, of which the next ones are known and scored."""
        tokens = torch.from_numpy(self._waiting[: length + 1])[None]
        nats, state = token_losses(self.model, tokens[:, :-1], tokens[:, 1:], self._state, self.precision)
        self.nats += nats.sum().item()
        self.scored += length
        return state

    @torch.no_grad()
    def finish(self) -> tuple[Tensor, State]:
        """Logits (1, vocabulary) after the last token, and the state that holds everything; the context stays as it is.

        Forks share the result as long as someone holds it.

        Raises:
            InputError: nothing was read.
        """
        if not len(self._waiting):
            raise InputError("nothing was read yet; read at least one token, such as the begin token")
        found = self._finished.get()
        if found is None:
            waiting = torch.from_numpy(self._waiting)[None].to(self.device)
            with autocast(self.precision, self.device):
                logits, state = self.model(waiting, self._state, logits_to_keep=1)
            found = logits[:, 0], state
            self._finished.keep(*found)
        return found

    def fork(self) -> "Context":
        """An independent copy, at no cost."""
        twin = object.__new__(Context)
        twin.__dict__.update(self.__dict__)
        return twin

    @property
    def _cache_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else self.model.dtype

    def save(self, path: str | Path, tokenizer: Tokenizer) -> None:
        """Write a bookmark, atomically: the new one or the old one is there, whatever happens.

        Raises:
            InputError: the path cannot be written, or holds something that is no bookmark.
        """
        check_writable(path, BOOKMARK)
        notes = {
            "tokenizer": tokenizer.fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "scored": str(self._losses[0]),
            "nats": repr(self._losses[1]),
        }
        tokens = torch.from_numpy(np.concatenate([*self._since, self._waiting]))
        StateFile(self._anchor, self.model.fingerprint(), tokens, notes).write(path)

    @classmethod
    def load(
        cls, path: str | Path, model: LanguageModel, tokenizer: Tokenizer, precision: Precision = "auto"
    ) -> "Context":
        """Read a bookmark.

        Raises:
            InputError: missing, truncated or altered file, or one of another model or tokenizer.
        """
        file = StateFile.read(path)
        if not file.is_bookmark:
            raise InputError(f"{path} is a bare state and no bookmark; load it with State.load")
        state = State.of_file(file, model, path)
        if file.notes["tokenizer"] != tokenizer.fingerprint:
            raise InputError(f"{path} was read with another tokenizer; read the text again with this one")
        losses = int(file.notes["scored"]), float(file.notes["nats"])
        return cls._going_on(model, precision, state, losses, file.tokens.numpy())

    @classmethod
    def _going_on(
        cls, model: LanguageModel, precision: Precision, state: State, losses: tuple[int, float], tokens: np.ndarray
    ) -> "Context":
        """From a state that can be kept, with what was scored before it, over the tokens since."""
        context = cls(model, precision)
        context.scored, context.nats = losses
        context._begin_at(state.to(dtype=context._cache_dtype))
        context.read(tokens)
        return context

    def read_by(self, model: LanguageModel) -> "Context":
        """The same text, read on by the same model as one process has it, where several ranks shared it.

        Tokens since the last place that can be kept are read again; it is then what that process would have read.
        """
        if model is self.model:
            return self
        state = State.from_tensors(self._anchor, model).to(self.device)
        return self._going_on(model, self.precision, state, self._losses, np.concatenate([*self._since, self._waiting]))


class _Finished:
    """What finish() gave, for the forks of a context, kept alive by its users alone: a state may take gigabytes."""

    def __init__(self) -> None:
        self._logits: Tensor | None = None
        self._state: Callable[[], State | None] = lambda: None

    def keep(self, logits: Tensor, state: State) -> None:
        self._logits, self._state = logits, weakref.ref(state)

    def get(self) -> tuple[Tensor, State] | None:
        state = self._state()
        return None if state is None or self._logits is None else (self._logits, state)


def bookmark_bytes(model: LanguageModel) -> int:
    """Size of the largest bookmark of a model; the file adds a few kilobytes of names.

    The unfinished chunk is not in it: its tokens are there to compute it anew. The chunk before it, which sliding
    attention sees, is, here in float32; in bf16 it takes half.
    """
    kept = sum(leaf.nbytes(torch.float32, at_chunk_end=True) for _, leaf in named(model.state_spec))
    return kept + 8 * unit_length(model.config)


def describe(path: str | Path) -> dict[str, str | int | float]:
    """What a bookmark or a bare state says of itself.

    Raises:
        InputError: missing, truncated or altered.
    """
    file = StateFile.read(path)
    notes = dict(file.notes)
    scored, nats = int(notes.pop("scored", 0)), float(notes.pop("nats", 0))
    positions = [position + len(file.tokens) for position in file.position]
    return {
        "kind": "bookmark" if file.is_bookmark else "bare state",
        "rows": len(positions),
        "position": positions[0] if len(set(positions)) == 1 else ", ".join(map(str, positions)),
        "bytes": Path(path).stat().st_size,
        "tokens to read again": len(file.tokens),
        "layers": len({name.split(".")[1] for name in file.tensors if name.startswith("layers.")}),
        "model": file.fingerprint,
        **notes,
        **({"nats per token": nats / scored} if scored else {}),
    }
