"""Context: what a model has read of one text, so that every way of cutting the text gives bitwise the same.

Rounding depends on how many tokens a matrix product takes at once. So text is always read in the same pieces, counted
from its beginning; tokens of the last, unfinished piece wait. They are part of the bookmark, which therefore holds no
attention cache and is small.
"""

from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .. import __version__
from ..config import ModelConfig
from ..data.tokenizer import Tokenizer
from ..errors import InputError
from ..files import BOOKMARK, check_writable
from ..model.decoder import Megalodon
from ..state import State, StateFile, is_cache
from ..training.loss import token_losses
from ..training.precision import Precision, autocast, choose_precision

PIECE = 4096  # tokens, or one chunk where that is longer; rounded down to whole chunks


def piece_length(config: ModelConfig) -> int:
    """Tokens in which a model reads."""
    return max(config.chunk_size, PIECE // config.chunk_size * config.chunk_size)


class Context:
    """One text, read so far by one model. It grows with `read`, in constant memory.

    Args:
        model: in evaluation mode.
        precision: of the matrix products; see Decoder.
    """

    def __init__(self, model: Megalodon, precision: Precision = "auto"):
        self.model = model
        self.device = model.embed.weight.device
        self.precision = choose_precision(precision, self.device)
        self.piece = piece_length(model.config)
        self.scored, self.nats = 0, 0.0
        self._state = State.empty(model.config, 1, self.device, self._cache_dtype)
        self._waiting = np.zeros(0, np.int64)

    @property
    def position(self) -> int:
        """Tokens read."""
        return int(self._state.position) + len(self._waiting)

    @property
    def last(self) -> int:
        """The token read last; there must be one."""
        return int(self._waiting[-1])

    def loss(self, complete: bool = True) -> float:
        """Mean loss of a token in nats; NaN before the second token.

        Args:
            complete: of all tokens; otherwise those of the unfinished piece are left out, which costs nothing.
        """
        whole = self.fork() if complete else self
        if complete and len(self._waiting) > 1:
            whole._run(len(self._waiting) - 1)
        return whole.nats / whole.scored if whole.scored else float("nan")

    @property
    def nbytes(self) -> int:
        """Bytes it takes in memory, however much was read."""
        return self._state.nbytes + self._waiting.nbytes

    def read(self, tokens: np.ndarray) -> None:
        """Read on.

        Args:
            tokens: (L,) int64.

        Raises:
            InputError: a token outside the vocabulary; nothing was read then.
        """
        self.model.check_tokens(torch.from_numpy(tokens)[None])
        self._waiting = np.concatenate([self._waiting, tokens])
        while len(self._waiting) > self.piece:  # a token after the piece is its last target
            self._state, _ = self._run(self.piece)
            self._waiting = self._waiting[self.piece :]
        self._waiting = self._waiting.copy()  # let go of what was read

    @torch.inference_mode()
    def _run(self, length: int) -> tuple[State, Tensor]:
        """Take tokens that wait into the state, and score those whose next token is known."""
        window = torch.from_numpy(self._waiting[: length + 1]).to(self.device)[None]
        with autocast(self.precision, self.device):
            hidden, state = self.model.features(window[:, :length], self._state)
            if length == len(self._waiting):
                return state, self.model.logits(hidden[:, -1])
            losses = token_losses(hidden, self.model.output.output.weight, window[:, 1:])
        self.nats += losses.double().sum().item()
        self.scored += length
        return state, losses

    def finish(self) -> tuple[Tensor, State]:
        """Logits (1, vocabulary) after the last token, and the state that holds everything; the context stays as it is.

        Raises:
            InputError: nothing was read.
        """
        if not len(self._waiting):
            raise InputError("nothing was read yet; read at least one token, such as the begin token")
        state, logits = self._run(len(self._waiting))
        return logits, state

    def fork(self) -> "Context":
        """An independent copy, at no cost."""
        twin = object.__new__(Context)
        twin.__dict__.update(self.__dict__)
        return twin

    @property
    def _cache_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.precision == "bf16" else self.model.embed.weight.dtype

    def save(self, path: str | Path, tokenizer: Tokenizer) -> None:
        """Write a bookmark, atomically: the new one or the old one is there, whatever happens.

        Raises:
            InputError: the place cannot be written, or holds something that is no bookmark.
        """
        check_writable(path, BOOKMARK)
        notes = {
            "tokenizer": tokenizer.fingerprint,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "scored": str(self.scored),
            "nats": repr(self.nats),
        }
        StateFile(self._state, self.model.fingerprint(), torch.from_numpy(self._waiting), notes).write(path)

    @classmethod
    def load(cls, path: str | Path, model: Megalodon, tokenizer: Tokenizer, precision: Precision = "auto") -> "Context":
        """Read a bookmark.

        Raises:
            InputError: missing, truncated or altered file, or one of another model or tokenizer.
        """
        file = StateFile.read(path)
        state = file.state_for(model, path)
        if "tokenizer" not in file.notes:
            raise InputError(f"{path} is a bare state and no bookmark; load it with State.load")
        if file.notes["tokenizer"] != tokenizer.fingerprint:
            raise InputError(f"{path} was read with another tokenizer; read the text again with this one")
        context = cls(model, precision)
        context._state = state.to(dtype=context._cache_dtype)
        context._waiting = file.tokens.numpy()
        context.scored, context.nats = int(file.notes["scored"]), float(file.notes["nats"])
        return context


def bookmark_bytes(config: ModelConfig) -> int:
    """Size of the largest bookmark of a model; the file adds a few kilobytes of names.

    The attention cache is not in it: the tokens of the unfinished piece are there to make it anew.
    """
    tensors = State.empty(config, 1, "meta").tensors().items()
    return sum(t.nbytes for name, t in tensors if not is_cache(name)) + 8 * piece_length(config)


def describe(path: str | Path) -> dict[str, str | int | float]:
    """What a bookmark or state file says of itself.

    Raises:
        InputError: missing, truncated or altered.
    """
    file = StateFile.read(path)
    notes = dict(file.notes)
    scored, nats = int(notes.pop("scored", 0)), float(notes.pop("nats", 0))
    positions = [int(p) + len(file.tokens) for p in file.state.position]
    return {
        "rows": len(positions),
        "position": positions[0] if len(set(positions)) == 1 else ", ".join(map(str, positions)),
        "bytes": Path(path).stat().st_size,
        "tokens of the unfinished piece": len(file.tokens),
        "layers": len(file.state.layers),
        "model": file.fingerprint,
        **notes,
        **({"nats per token": nats / scored} if scored else {}),
    }
