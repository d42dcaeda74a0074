"""What a file holds of what was read: the tensors of a state, the model they belong to, and tokens to read on from."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from .errors import InputError
from .files import write_atomically

FORMAT, OLDER_FORMAT = "megalodon-state-3", "megalodon-state-2"
TOKENS = "tokens"


@dataclass(frozen=True, eq=False)
class StateFile:
    """A bare state, or a bookmark.

    Attributes:
        tensors: of the state by name, of caches only what is used; see State.used.
        fingerprint: of the model.
        tokens: int64, read but not yet in the state; none for a bare state, see generation.context.
        notes: strings by name, such as the date.
        sampled: whether the fingerprint is that of the older format, of a sample of the weights.
    """

    tensors: Mapping[str, Tensor]
    fingerprint: str
    tokens: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    notes: dict[str, str] = field(default_factory=dict)
    sampled: bool = False

    @property
    def is_bookmark(self) -> bool:
        """Whether it is a context that was kept, and no bare state."""
        return "tokenizer" in self.notes

    @property
    def position(self) -> list[int]:
        """Of each row."""
        return self.tensors["position"].tolist()

    def write(self, path: str | Path) -> None:
        """Write atomically."""
        stored = {n: t.detach().cpu().contiguous() for n, t in self.tensors.items()}
        stored = {n: t.clone() for n, t in stored.items()} | {TOKENS: self.tokens}
        metadata = {
            **self.notes,
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "position": json.dumps(self.position),
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
        return cls(stored, metadata["fingerprint"], tokens, notes, metadata["format"] == OLDER_FORMAT)


def _checksum(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name}{t.dtype}{tuple(t.shape)}".encode())
        digest.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return digest.hexdigest()
