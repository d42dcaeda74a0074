"""Prepared text on disk: shards of tokens, read through memory maps.

A prepared folder holds `prepared.json` and for each shard NNNNN

    NNNNN.tokens       tokens of its documents one after the other, each behind a begin token, little-endian
    NNNNN.documents    a record a document: where its tokens end, the number of its file, and its offset there
    NNNNN.answers      of chats: a byte a token, 1 for those of an answer

`prepared.json` names the tokenizer, the files the text came from, and size and SHA-256 of every shard file.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np

from ..errors import InputError
from ..files import check
from ..tables import read_sealed

MANIFEST = "prepared.json"
DOCUMENT = np.dtype([("end", "<i8"), ("file", "<i4"), ("offset", "<i8")])
MAPS = 256
"""Files mapped at a time, of all prepared folders together: each holds a file descriptor, of which many have 1,024."""


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
        answers: of each shard of chats, a memory map of a bool for each token; None where the text is none.
    """

    manifest: dict[str, Any]
    tokens: "MappedFiles"
    documents: list[np.ndarray]
    answers: "MappedFiles | None"

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
        shards = [folder / shard["name"] for shard in manifest["shards"]]
        for shard in manifest["shards"]:
            for name, expected in shard["files"].items():
                check(folder / name, expected, verify)
        return cls(
            manifest,
            MappedFiles([shard.with_suffix(".tokens") for shard in shards], manifest["dtype"]),
            [np.fromfile(shard.with_suffix(".documents"), DOCUMENT) for shard in shards],
            MappedFiles([shard.with_suffix(".answers") for shard in shards], "?") if manifest.get("chats") else None,
        )

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
    if not (folder / MANIFEST).exists():
        raise InputError(f"{folder} is no prepared folder: it has no {MANIFEST}")
    try:
        return read_sealed(folder / MANIFEST)
    except InputError as error:
        raise InputError(f"{error}; prepare the text again") from None


class _File(NamedTuple):
    """A file as it was when it was opened first."""

    path: Path
    inode: int
    changed: int


class MappedFiles(Sequence[np.ndarray]):
    """Arrays in files, each mapped when it is asked for.

    Args:
        paths: of the files.
        dtype: of all of them.
    """

    def __init__(self, paths: list[Path], dtype: str):
        stats = [path.stat() for path in paths]
        self._files = [_File(p, s.st_ino, s.st_mtime_ns) for p, s in zip(paths, stats, strict=True)]
        self._dtype = dtype

    def __len__(self) -> int:
        return len(self._files)

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [_mapped(file, self._dtype) for file in self._files[index]]
        return _mapped(self._files[index], self._dtype)


@lru_cache(MAPS)
def _mapped(file: _File, dtype: str) -> np.ndarray:
    try:
        found = file.path.stat()
        if (found.st_ino, found.st_mtime_ns) != (file.inode, file.changed):
            raise InputError(f"{file.path} was replaced while it was in use")
        return np.memmap(file.path, dtype, "r") if found.st_size else np.zeros(0, dtype)
    except OSError as error:
        raise InputError(f"cannot read {file.path}: {error.strerror}") from None
