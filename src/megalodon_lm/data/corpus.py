"""Documents named by a recipe or a command line, or given by a program: the bundled novels, files, folders, strings."""

import itertools
import shutil
import tempfile
import warnings
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

from ..errors import InputError, InputNote
from .books import bundled
from .documents import DocumentReader, Part, told
from .sources import STANDARD_INPUT, find_files, is_stream, stat_of, stored
from .unpacked import BLOCK_BYTES, blocks_of

Source = str | bytes | Path | BinaryIO | Iterable[str | bytes]
Streams = Literal["refused", "once", "kept"]
BUNDLED = "bundled:"


class Text(NamedTuple):
    """A document."""

    name: str
    """Of the file or novel it is in."""
    blocks: Iterator[bytes]
    """In UTF-8."""


class Texts:
    """The documents of some sources, in order and in constant memory, as often as they are iterated over.

    What cannot be read is left out; an InputNote tells how much that is.

    Args:
        sources: "bundled:train", "bundled:validation", or what find_files takes.
        streams: what can be read only once, such as a pipe, is refused, or taken if that is enough, or kept as a file.

    Raises:
        InputError: missing or unreadable source, no source at all, or no text in them; that may show while reader.
    """

    def __init__(self, sources: Sequence[str | Path], streams: Streams = "refused"):
        if not sources:
            raise InputError("no text given; name files, folders, or bundled:train")
        self._sources, self._told = ", ".join(map(str, sources)), False
        self._items: list[tuple[str, Path | bytes]] = []
        for is_bundled, group in itertools.groupby(sources, lambda source: str(source).startswith(BUNDLED)):
            if is_bundled:
                self._items += [item for s in group for item in bundled(str(s).removeprefix(BUNDLED)).items()]
                continue
            found = find_files(list(group))
            self._items += [("standard input" if path == STANDARD_INPUT else str(path), path) for path in found.files]
            if found.left_out:
                warnings.warn(InputNote(str(found)), stacklevel=2)
        pipes = [name for name, item in self._items if _is_pipe(item)]
        if pipes and streams == "refused":
            raise InputError(f"{pipes[0]} can be read only once, and is needed again; write it to a file first")
        if pipes and streams == "kept":
            self._folder = Path(tempfile.mkdtemp(prefix="megalodon-"))
            weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            self._items = [(name, self._kept(number, item)) for number, (name, item) in enumerate(self._items)]
        self._sizes = [_size(item) for _, item in self._items]  # the files may be gone when they were read
        self.num_bytes = None if pipes and streams == "once" else sum(self._sizes)
        """As stored, all together; None if that is not known."""
        self.name, self.num_read = "", 0
        """Of the text being read: its name, and how many bytes of it were given."""
        self._finished, self._reader = 0, DocumentReader()

    def __iter__(self) -> Iterator[Text]:
        self._finished, self._reader, count = 0, DocumentReader(), 0
        try:
            for (name, item), size in zip(self._items, self._sizes, strict=True):
                for blocks in [_cut(item)] if isinstance(item, bytes) else _texts(self._reader, item):
                    count += 1
                    self.name, self.num_read = name, 0
                    yield Text(name, self._counted(blocks))
                self._finished += size
        finally:
            if count and self._reader.faults and not self._told:
                self._told = True
                _tell(self._reader)
        if not count:
            why = "".join(f"; {told(fault)}" for fault in self._reader.faults[:1])
            raise InputError(f"there is no text in {self._sources}{why}")

    def _counted(self, blocks: Iterator[bytes]) -> Iterator[bytes]:
        for block in blocks:
            self.num_read += len(block)
            yield block

    @property
    def done(self) -> int:
        """Bytes, of num_bytes, read since the last iteration began."""
        return self._finished + (self._reader.source.position if self._reader.source else 0)

    def whole(self) -> bytes:
        """All documents, one behind the other."""
        return b"".join(block for text in self for block in text.blocks)

    def _kept(self, number: int, item: Path | bytes) -> Path | bytes:
        """A file with what a stream gives, or the same item."""
        if not isinstance(item, Path) or not _is_pipe(item):
            return item
        path = self._folder / f"{number}{''.join(item.suffixes)}"
        try:
            with stored(item) as stream, path.open("wb") as file:
                shutil.copyfileobj(stream, file)
        except OSError as error:
            raise InputError(f"cannot keep {item} in {path}: {error.strerror}") from None
        return path


def texts_of(source: Source | Texts) -> Iterator[Iterator[bytes]]:
    """The documents of a source, each in blocks of bytes and in constant memory.

    Args:
        source: a string or bytes is one document, and so are a binary file and an iterable of strings or bytes, which
            are read as the blocks are taken; a Path may hold several.

    Raises:
        InputError: see Texts.
    """
    if isinstance(source, Path):
        source = Texts([source], "once")
    if isinstance(source, Texts):
        yield from (text.blocks for text in source)
    elif isinstance(source, str | bytes):
        yield _cut(_encoded(source))
    elif hasattr(source, "read"):
        reader = DocumentReader()
        yield reader.decoded(str(getattr(source, "name", "the file")), blocks_of(source))
        if reader.faults:
            _tell(reader)
    else:
        yield map(_encoded, source)


def _encoded(text: str | bytes) -> bytes:
    """In UTF-8; half characters, of a command line in another encoding, are replaced."""
    return text.encode("utf-8", "replace") if isinstance(text, str) else text


def _cut(raw: bytes) -> Iterator[bytes]:
    return (raw[at : at + BLOCK_BYTES] for at in range(0, len(raw), BLOCK_BYTES))


def _texts(reader: DocumentReader, path: Path) -> Iterator[Iterator[bytes]]:
    for document in reader.documents(Part(str(path), 0, -1, 0)):
        assert not isinstance(document.content, list), "these are chats"
        yield document.content


def _is_pipe(item: Path | bytes) -> bool:
    return isinstance(item, Path) and is_stream(item)


def _size(item: Path | bytes) -> int:
    return len(item) if isinstance(item, bytes) else 0 if is_stream(item) else stat_of(item).st_size


def _tell(reader: DocumentReader) -> None:
    count = len(reader.faults) + reader.unlisted
    warnings.warn(
        InputNote(f"{count:,} fault{'s' * (count > 1)} in what was read; the first is {told(reader.faults[0])}"),
        stacklevel=3,
    )
