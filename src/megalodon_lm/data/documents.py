"""Documents in files of any kind: text, JSONL, both also compressed, and Parquet. Nothing is dropped unseen.

A document is a text, or a chat of several messages.
"""

import codecs
import dataclasses
import functools
import gzip
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from ..errors import InputError
from .chat import Message, messages_of

BLOCK = 1 << 16  # bytes
LONGEST_LINE = 1 << 28  # bytes of a JSONL line
KINDS = (".txt", ".text", ".md", ".jsonl", ".ndjson", ".parquet")
COMPRESSIONS = (".gz", ".zst")


class Part(NamedTuple):
    """A stretch of a file: bytes start..stop of JSONL, row groups start..stop of Parquet, otherwise all of it."""

    path: str
    start: int
    stop: int
    size: int
    """Bytes in the file, about."""


class Document(NamedTuple):
    """A text in blocks of UTF-8 or the messages of a chat, and the line or row it stands in."""

    place: int
    content: Iterator[bytes] | list[Message]


@dataclass
class Reading:
    """How to read, and what was wrong with what was read.

    Attributes:
        column: field of JSONL and Parquet that holds the text or the messages.
        encoding: of text files without a byte order mark.
        chats: every line or row is a chat; see chat.messages_of.
        faults: what could not be taken as it is: path, line or byte, reason, and whether it was left out or mended.
    """

    column: str = "text"
    encoding: str = "utf-8"
    chats: bool = False
    faults: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def fault(self, path: str, place: int, reason: str, outcome: str = "left out") -> None:
        """Note one."""
        self.faults.append({"path": path, "place": place, "reason": reason, "outcome": outcome})

    def documents(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order.

        Raises:
            InputError: the file cannot be opened, lacks the field, or is a text file where chats are wanted.
        """
        kind = kind_of(Path(part.path))
        if self.chats and kind not in (".parquet", ".jsonl", ".ndjson"):
            raise InputError(f"{part.path} is a text file; chats come as JSONL or Parquet")
        if kind == ".parquet":
            return self._rows(part)
        return self._lines(part) if kind in (".jsonl", ".ndjson") else self._text(part)

    def _text(self, part: Part) -> Iterator[Document]:
        """One document: the whole file, in UTF-8 whatever it was in."""
        with opened(Path(part.path)) as file:
            yield Document(0, self._decoded(part.path, file))

    def _decoded(self, path: str, file: BinaryIO) -> Iterator[bytes]:
        decoder, encoding, at = None, "", 0
        while True:
            block = _read(self, path, at, lambda: file.read(BLOCK))
            if decoder is None:
                encoding, mark = _encoding(block, self.encoding)
                decoder = codecs.getincrementaldecoder(encoding)("megalodon.mend")
                block, at = block[mark:], mark
            begin = at - len(decoder.getstate()[0])
            note = functools.partial(self._undecodable, path, begin, encoding)
            with _mending(note):
                text = decoder.decode(block, not block)
            if text:
                yield text.encode()
            if not block:
                return
            at += len(block)

    def _undecodable(self, path: str, begin: int, encoding: str, start: int) -> None:
        self.fault(path, begin + start, f"not {encoding}", "mended")

    def _lines(self, part: Part) -> Iterator[Document]:
        """A document a line. Lines that begin in the part belong to it."""
        with opened(Path(part.path)) as file:
            at = part.start
            if part.start:
                file.seek(part.start - 1)
                at += len(file.readline(LONGEST_LINE)) - 1
            while at < part.stop or part.stop < 0:
                line = _read(self, part.path, at, lambda: file.readline(LONGEST_LINE))
                if not line:
                    return
                if content := self._line(part.path, at, line):
                    yield Document(at, content)
                at += len(line)

    def _line(self, path: str, at: int, line: bytes) -> Iterator[bytes] | list[Message] | None:
        """The content of a line, or nothing."""
        if not line.strip():
            return None
        try:
            value = json.loads(line)
        except ValueError as error:
            self.fault(path, at, "longer than 256 MB" if len(line) >= LONGEST_LINE else f"not JSON: {error}")
            return None
        return self._content(path, at, value.get(self.column) if isinstance(value, dict) else None)

    def _content(self, path: str, place: int, value: Any) -> Iterator[bytes] | list[Message] | None:
        """What a field holds, or nothing."""
        if self.chats:
            try:
                return [Message(*(_mended(self, path, place, text) for text in m)) for m in messages_of(value)]
            except ValueError as error:
                self.fault(path, place, f"{error} in the field {self.column!r}")
        elif not isinstance(value, str):
            self.fault(path, place, f"no text in the field {self.column!r}")
        elif value:
            return iter([_mended(self, path, place, value).encode()])
        return None

    def _rows(self, part: Part) -> Iterator[Document]:
        """A document a row."""
        table = parquet(Path(part.path))
        if self.column not in table.schema_arrow.names:
            raise InputError(
                f"{part.path} has no column {self.column!r}; it has {', '.join(table.schema_arrow.names)}; name one"
            )
        groups = list(range(part.start, part.stop))
        row = sum(table.metadata.row_group(i).num_rows for i in range(part.start))
        for batch in table.iter_batches(256, groups, columns=[self.column]):
            for value in batch.column(0).to_pylist():
                if content := self._content(part.path, row, value):
                    yield Document(row, content)
                row += 1


def kind_of(path: Path) -> str:
    """The suffix that tells what is in a file, whatever it is compressed with."""
    suffixes = [s for s in path.suffixes if s not in COMPRESSIONS]
    return suffixes[-1] if suffixes else ""


def find_files(sources: list[str]) -> list[Path]:
    """The files of the sources: a file is itself, a folder all files in it of known kinds, in order of their names.

    Raises:
        InputError: a missing file, a file of unknown kind, or a folder without any.
    """
    found: list[Path] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            inside = sorted(p for p in path.rglob("*") if p.is_file() and kind_of(p) in KINDS)
            if not inside:
                raise InputError(f"the folder {path} holds no file of the kinds {', '.join(KINDS)}")
            found += inside
        elif not path.exists():
            raise InputError(f"no such file: {path}")
        elif kind_of(path) not in KINDS:
            raise InputError(f"{path} is of no known kind; known are {', '.join(KINDS)}, also with .gz and .zst")
        else:
            found.append(path)
    if not found:
        raise InputError("no text given; name files or folders")
    return found


def parts_of(path: Path, largest: int) -> Iterator[Part]:
    """A file in parts that can be read each by itself; text and compressed files are one part.

    Args:
        path: of the file.
        largest: bytes of a part, about.
    """
    size = path.stat().st_size
    kind = kind_of(path)
    if kind == ".parquet":
        metadata = parquet(path).metadata
        start = held = 0
        for i in range(metadata.num_row_groups):
            held += metadata.row_group(i).total_byte_size
            if held >= largest or i + 1 == metadata.num_row_groups:
                yield Part(str(path), start, i + 1, held)
                start, held = i + 1, 0
    elif kind in (".jsonl", ".ndjson") and path.suffix not in COMPRESSIONS:
        yield from (
            Part(str(path), at, min(at + largest, size), min(largest, size - at)) for at in range(0, size, largest)
        )
    else:
        yield Part(str(path), 0, -1, size)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """An open file, uncompressed on the way; what goes wrong with it is one line."""
    try:
        with path.open("rb") as raw:
            if path.suffix == ".gz":
                with gzip.open(raw) as file:
                    yield file  # type: ignore[misc]
            elif path.suffix == ".zst":
                try:
                    import zstandard
                except ImportError:
                    raise InputError(f"{path} is compressed with zstd; install zstandard to read it") from None
                import io

                yield io.BufferedReader(zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True))
            else:
                yield raw
    except FileNotFoundError:
        raise InputError(f"no such file: {path}") from None
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from None


def parquet(path: Path) -> Any:
    """An open Parquet file.

    Raises:
        InputError: pyarrow is not installed, or the file is broken.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        raise InputError(f"{path} is a Parquet file; install pyarrow to read it") from None
    try:
        return ParquetFile(path)
    except (OSError, ArrowException) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _read(reading: Reading, path: str, at: int, read: Callable[[], bytes]) -> bytes:
    """What is read; the damaged rest of a compressed file is a fault."""
    import zlib

    broken: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    if path.endswith(".zst"):
        from zstandard import ZstdError

        broken = (*broken, ZstdError)
    try:
        return read()
    except broken as error:
        reading.fault(path, at, f"the compressed file is damaged from here on: {error}")
        return b""


def _mended(reading: Reading, path: str, place: int, text: str) -> str:
    """A text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        reading.fault(path, place, "lone surrogates", "mended")
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _encoding(first: bytes, usual: str) -> tuple[str, int]:
    """Encoding by the byte order mark, and the length of the mark."""
    for mark, name in (
        (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
        (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
    ):  # fmt: skip
        if first.startswith(mark):
            return name, len(mark)
    return usual, 0


_listeners: list[Callable[[int], None]] = []


@contextmanager
def _mending(listener: Callable[[int], None]) -> Iterator[None]:
    """Tell the listener of each place where the error handler below mends."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.pop()


def _mend(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    if _listeners:
        _listeners[-1](error.start)
    return "\ufffd", error.end


codecs.register_error("megalodon.mend", _mend)
