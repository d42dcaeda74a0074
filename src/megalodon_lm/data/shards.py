"""Prepared text on disk: shards of tokens, read through memory maps.

A prepared folder holds `prepared.json` and for each shard NNNNN

    NNNNN.tokens       tokens of its documents one after the other, each behind a begin token, little-endian
    NNNNN.documents    a record a document: where its tokens end, the number of its file, and its place there
    NNNNN.answers      of chats: a byte a token, 1 for those of an answer

`prepared.json` names the tokenizer, the files the text came from, and size and SHA-256 of every shard file.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import InputError
from ..files import check

MANIFEST = "prepared.json"
DOCUMENT = np.dtype([("end", "<i8"), ("file", "<i4"), ("place", "<i8")])


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest type that holds all tokens."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened.

    Attributes:
        manifest: what prepared.json says.
        tokens: of each shard, a memory map.
        documents: of each shard, DOCUMENT records.
        answers: of each shard of chats, bool for each token; None where the text is none.
    """

    manifest: dict[str, Any]
    tokens: list[np.ndarray]
    documents: list[np.ndarray]
    answers: list[np.ndarray] | None

    @classmethod
    def open(cls, folder: Path, verify: bool = False) -> "Prepared":
        """Open a folder.

        Args:
            folder: as prepare leaves it.
            verify: read all of it and compare checksums too, not sizes alone.

        Raises:
            InputError: not prepared or not completely, or a shard that is missing, of another size or altered.
        """
        manifest = read_manifest(folder)
        if not manifest.get("complete"):
            raise InputError(f"{folder} is not prepared completely; run megalodon prepare again, it goes on")
        dtype = np.dtype(manifest["dtype"])
        tokens, documents, answers = [], [], []
        for shard in manifest["shards"]:
            for name, expected in shard["files"].items():
                check(folder / name, expected, verify)
            tokens.append(_mapped(folder / f"{shard['name']}.tokens", dtype))
            documents.append(_mapped(folder / f"{shard['name']}.documents", DOCUMENT))
            if manifest.get("chats"):
                answers.append(_mapped(folder / f"{shard['name']}.answers", np.dtype(np.bool_)))
        return cls(manifest, tokens, documents, answers or None)

    @property
    def digest(self) -> str:
        """Hash of all checksums."""
        return hashlib.sha256(json.dumps([shard["files"] for shard in self.manifest["shards"]]).encode()).hexdigest()


def is_prepared(source: str) -> bool:
    """Whether a source is a prepared folder."""
    return (Path(source) / MANIFEST).exists()


def read_manifest(folder: Path) -> dict[str, Any]:
    """prepared.json.

    Raises:
        InputError: missing or broken.
    """
    path = folder / MANIFEST
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise InputError(f"{folder} is no prepared folder: it has no {MANIFEST}") from None
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path} cannot be read; it was truncated or altered; prepare the text again") from None


def _mapped(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)
    return np.memmap(path, dtype, "r")
