"""Documents named by a recipe or a command line: the bundled novels, files and folders."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from .books import bundled

Source = str | bytes | Path | BinaryIO | Iterable[str | bytes]
BLOCK = 1 << 16  # bytes


def read_documents(sources: list[str]) -> dict[str, bytes]:
    """Read every document of the sources, by name.

    Args:
        sources: "bundled:train", "bundled:validation", a text file, or a folder whose *.txt files are taken in order.

    Raises:
        ValueError: missing or unreadable source, empty text, or no source at all.
    """
    if not sources:
        raise ValueError("no text given; name a file, a folder of .txt files, or bundled:train")
    documents: dict[str, bytes] = {}
    for source in sources:
        if source.startswith("bundled:"):
            documents.update(bundled(source.removeprefix("bundled:")))
            continue
        path = Path(source)
        paths = sorted(path.glob("*.txt")) if path.is_dir() else [path]
        if not paths:
            raise ValueError(f"the folder {path} holds no .txt file")
        for p in paths:
            documents[str(p)] = read_text(p)
    return documents


def read_text(path: str | Path) -> bytes:
    """The bytes of a file that must exist and hold something.

    Raises:
        ValueError: missing, unreadable or empty.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError:
        raise ValueError(f"no such file: {path}") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if not content:
        raise ValueError(f"{path} is empty; there is nothing to read in it")
    return content


def blocks(source: Source) -> Iterator[bytes]:
    """A text in blocks of bytes, in constant memory.

    Args:
        source: a string or bytes is the text itself; a Path, a binary file or an iterable of strings or bytes is read
            as the blocks are taken.

    Raises:
        ValueError: a path that is missing or unreadable, or that becomes so.
    """
    if isinstance(source, str | bytes):
        raw = source.encode() if isinstance(source, str) else source
        yield from (raw[at : at + BLOCK] for at in range(0, len(raw), BLOCK))
    elif isinstance(source, Path):
        try:
            with source.open("rb") as file:
                yield from blocks(file)
        except OSError as error:
            raise ValueError(f"cannot read {source}: {error.strerror}") from None
    elif hasattr(source, "read"):
        while block := source.read(BLOCK):
            yield block
    else:
        for part in source:
            yield from blocks(part)
