"""Documents named by a recipe or a command line: the bundled novels, files and folders."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ..errors import InputError
from .books import bundled

Source = str | bytes | Path | BinaryIO | Iterable["str | bytes | Path | BinaryIO"]
BLOCK = 1 << 16  # bytes


def find_documents(sources: Sequence[str]) -> dict[str, Path | bytes]:
    """Every document of the sources by name: a file by its path, a bundled novel by its text.

    Args:
        sources: "bundled:train", "bundled:validation", a text file, or a folder whose *.txt files are taken in order.

    Raises:
        InputError: missing, unreadable or empty file, a folder without text, or no source at all.
    """
    if not sources:
        raise InputError("no text given; name a file, a folder of .txt files, or bundled:train")
    documents: dict[str, Path | bytes] = {}
    for source in sources:
        if source.startswith("bundled:"):
            documents.update(bundled(source.removeprefix("bundled:")))
            continue
        path = Path(source)
        paths = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not paths:
            raise InputError(f"the folder {path} holds no .txt file")
        for p in paths:
            with _opened(p) as file:
                if not file.read(1):
                    raise InputError(f"{p} is empty; there is nothing to read in it")
            documents[str(p)] = p
    return documents


def read_documents(sources: Sequence[str]) -> dict[str, bytes]:
    """As find_documents, the whole text of each."""
    return {name: b"".join(blocks(document)) for name, document in find_documents(sources).items()}


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """An open file; what goes wrong with it is one line."""
    try:
        with path.open("rb") as file:
            yield file
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None


def blocks(source: Source) -> Iterator[bytes]:
    """A text in blocks of bytes, in constant memory.

    Args:
        source: a string or bytes is the text itself; a Path, a binary file or an iterable of strings or bytes is read
            as the blocks are taken, and an iterable of paths or files one after the other.

    Raises:
        InputError: a path that is missing or unreadable, or that becomes so.
    """
    if isinstance(source, str | bytes):
        raw = source.encode() if isinstance(source, str) else source
        yield from (raw[at : at + BLOCK] for at in range(0, len(raw), BLOCK))
    elif isinstance(source, Path):
        with _opened(source) as file:
            yield from blocks(file)
    elif hasattr(source, "read"):
        while block := source.read(BLOCK):
            yield block
    else:
        for part in source:
            yield from blocks(part)


def size(document: Path | bytes) -> int:
    """Bytes of a document."""
    return document.stat().st_size if isinstance(document, Path) else len(document)
