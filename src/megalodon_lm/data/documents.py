"""Documents in files of any kind: text, JSONL, both also compressed, and Parquet. Nothing is dropped unseen.

A document is a text, or a chat of several messages.
"""

import codecs
import dataclasses
import functools
import io
import itertools
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from .chat import Message, messages_of
from .parquet import Table, Unreadable
from .sources import LINES, TABLES, compression_of, is_stream, kind_of, stat_of
from .token_text import without_halves
from .unpacked import FileOfBlocks, Unpacked

LONGEST_LINE = 1 << 28  # bytes of a JSONL line
LISTED = 1000  # faults of a reader that are kept; more are counted
MARKS = (
    (codecs.BOM_UTF8, "utf-8"), (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
OTHERS = (
    (b"%PDF-", "a PDF"), (b"PK\3\4", "a zip archive, as office documents are too"), (b"\x1f\x8b", "compressed"),
    (b"\x28\xb5\x2f\xfd", "compressed"), (b"BZh91AY&SY", "compressed"), (b"\xfd7zXZ", "compressed"),
    (b"PAR1", "Parquet"),
)  # fmt: skip
"""How files begin that are no text."""


class Part(NamedTuple):
    """A stretch of a file: bytes start..stop of JSONL, row groups start..stop of Parquet; a stop of -1 is the end."""

    path: str
    start: int
    stop: int
    size: int
    """Bytes in the file, about."""


class Document(NamedTuple):
    """A text in blocks of UTF-8 or the messages of a chat, and the byte or row it begins at."""

    offset: int
    content: Iterator[bytes] | list[Message]


class _Wrong(Exception):
    """What is wrong with a line."""


@dataclass
class DocumentReader:
    """Reads documents, and notes what was wrong with them.

    Attributes:
        column: field of JSONL and Parquet that holds the text or the messages.
        encoding: of text files without a byte order mark.
        chats: every line or row is a chat; see chat.messages_of.
        faults: what could not be taken as it is: path, where (line or row from 1, or byte from 0), reason, and whether
            it was left out or mended; about LISTED of them.
        unlisted: how many more there were.
        lines: lines of JSONL that were read.
        source: what is being read.
    """

    column: str = "text"
    encoding: str = "utf-8"
    chats: bool = False
    faults: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    unlisted: int = 0
    lines: int = 0
    source: Unpacked | None = None

    def fault(self, path: str, reason: str, unit: str = "", number: int = 0, outcome: str = "left out") -> None:
        """Note one."""
        if len(self.faults) < LISTED:
            where = {unit: number} if unit else {}
            self.faults.append({"path": path, **where, "reason": reason, "outcome": outcome})
        else:
            self.unlisted += 1

    def _damage(self, path: str, reason: str, unit: str, number: int) -> None:
        """Note that the rest of a file cannot be had, however many faults there were before: in it, too, at times."""
        self.faults.append({"path": path, unit: number, "reason": reason, "outcome": "left out"})

    def documents(self, part: Part) -> Iterator[Document]:
        """The documents of a part, in order. What cannot be read is a fault.

        Raises:
            InputError: a library is missing that the file needs.
        """
        kind = kind_of(Path(part.path))
        if kind in TABLES:
            yield from self._rows(part)
            return
        with Unpacked(Path(part.path), max(0, part.start - 1)) as self.source:
            yield from self._lines(part, self.source) if kind in LINES else self._text(part, self.source, bool(kind))

    def decoded(self, name: str, blocks: Iterator[bytes]) -> Iterator[bytes]:
        """A text in UTF-8, whatever it was in; what cannot be decoded is a fault and replaced."""
        first = b""
        while len(first) < 4 and (block := next(blocks, b"")):
            first += block
        encoding, mark = next(((e, len(m)) for m, e in MARKS if first.startswith(m)), (self.encoding, 0))
        decoder = codecs.getincrementaldecoder(encoding)("megalodon.mend")
        at = mark
        for block in itertools.chain(filter(None, [first[mark:]]), blocks, [b""]):
            if not block and self.source is not None and self.source.damage:
                return  # a character that was cut is part of the damage
            begin = at - len(decoder.getstate()[0])
            with _mending(functools.partial(self._undecodable, name, begin, encoding)):
                text = decoder.decode(block, not block)
            if text:
                yield text.encode()
            at += len(block)

    def _undecodable(self, name: str, begin: int, encoding: str, start: int) -> None:
        self.fault(name, f"not {encoding}", "byte", begin + start, "mended")

    def _text(self, part: Part, source: Unpacked, is_known: bool) -> Iterator[Document]:
        """One document: the whole file."""
        if self.chats:
            self.fault(part.path, "a text file; chats come as JSONL or Parquet")
            return
        blocks = iter(source)
        first = next(blocks, b"")
        if other := _no_text(first, is_known):
            self.fault(part.path, other)
            return
        text = self._counted(part.path, self.decoded(part.path, itertools.chain([first], blocks)), source)
        beginning = next(text, b"")
        if beginning:
            yield Document(0, itertools.chain([beginning], text))
        elif not source.damage:
            self.fault(part.path, "empty")

    def _counted(self, path: str, text: Iterator[bytes], source: Unpacked) -> Iterator[bytes]:
        count = 0
        for block in text:
            yield block
            count += len(block)
        if source.damage:
            self._damage(path, source.damage, "byte", count)

    def _lines(self, part: Part, source: Unpacked) -> Iterator[Document]:
        """A document a line. Lines that begin in the part belong to it."""
        file, at, number, cut = self._file(part, source), part.start, 0, False
        if part.start:
            at += len(_line(file)[0]) - 1
        while at < part.stop or part.stop < 0:
            line, length = _line(file)
            if not line:
                break
            number += 1
            self.lines += 1
            at, begin = at + length, at
            if line.isspace():
                continue
            try:
                if content := self._content(part.path, self._value(line, length), "line", number):
                    yield Document(begin, content)
            except _Wrong as error:
                cut = bool(source.damage) and not line.endswith(b"\n")
                if not cut:
                    self.fault(part.path, str(error), "line", number)
        if source.damage:
            self._damage(part.path, source.damage, "line", number + (not cut))

    def _file(self, part: Part, source: Unpacked) -> BinaryIO:
        """The lines of a part in UTF-8."""
        file = io.BufferedReader(FileOfBlocks(iter(source)), 1 << 17)
        if not part.start and _is_wide(file.peek(4)):
            blocks = iter(functools.partial(file.read, 1 << 16), b"")
            file = io.BufferedReader(FileOfBlocks(self.decoded(part.path, blocks)))
        return file

    def _value(self, line: bytes, length: int) -> Any:
        """The field of a line; an empty text of an empty line."""
        if length > LONGEST_LINE:
            raise _Wrong("longer than 256 MB")
        try:
            value = json.loads(line)
        except RecursionError:
            raise _Wrong("not readable as JSON: nested too deep") from None
        except ValueError as error:
            if line.startswith(codecs.BOM_UTF8):  # several, where files were joined
                return self._value(line.removeprefix(codecs.BOM_UTF8), length)
            at = f"{error.msg} in column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
            raise _Wrong(f"not JSON: {at}") from None
        return value.get(self.column) if isinstance(value, dict) else None

    def _content(self, path: str, value: Any, unit: str, number: int) -> Iterator[bytes] | list[Message] | None:
        """What a field holds, or nothing."""
        if self.chats:
            try:
                return [Message(*(self._mended(path, text, unit, number) for text in m)) for m in messages_of(value)]
            except ValueError as error:
                self.fault(path, f"{error} in the field {self.column!r}", unit, number)
        elif not isinstance(value, str):
            self.fault(path, f"no text in the field {self.column!r}", unit, number)
        elif value:
            return iter([self._mended(path, value, unit, number).encode()])
        return None

    def _mended(self, path: str, text: str, unit: str, number: int) -> str:
        """A text without lone surrogates, which are a fault."""
        whole = without_halves(text)
        if whole != text:
            self.fault(path, "lone surrogates", unit, number, "mended")
        return whole

    def _rows(self, part: Part) -> Iterator[Document]:
        """A document a row."""
        try:
            table = Table(Path(part.path))
        except Unreadable as error:
            self.fault(part.path, str(error))
            return
        if self.column not in table.columns:
            self.fault(part.path, f"no column {self.column!r}; there are {', '.join(table.columns)}; name one as field")
            return
        for group in range(part.start, len(table.rows) if part.stop < 0 else part.stop):
            first = row = sum(table.rows[:group])

            def mended(number: int, first: int = first) -> None:
                self.fault(part.path, "not utf-8", "row", first + number + 1, "mended")

            try:
                for value in table.values(self.column, group, mended):
                    if content := self._content(part.path, value, "row", row + 1):
                        yield Document(row, content)
                    row += 1
            except Unreadable as error:
                self.fault(part.path, str(error), "row", row + 1)


def parts_of(path: Path, largest: int) -> Iterator[Part]:
    """A file in parts that can be read each by itself; text, compressed files and streams are one part.

    Args:
        path: of the file.
        largest: bytes of a part, about.
    """
    size = 0 if is_stream(path) else stat_of(path).st_size
    kind = kind_of(path)
    if kind in TABLES and (sizes := _sizes(path)):
        start = held = 0
        for i, group in enumerate(sizes, 1):
            held += group
            if held >= largest or i == len(sizes):
                yield Part(str(path), start, i, held)
                start, held = i, 0
    elif kind in LINES and not compression_of(path) and size and not _is_wide(_first_bytes(path)):
        for at in range(0, size, largest):
            yield Part(str(path), at, min(at + largest, size), min(largest, size - at))
    else:
        yield Part(str(path), 0, -1, size)


def place_of(path: str, document: Document) -> str:
    """Where in its file a document begins, counted as in faults."""
    return f"row {document.offset + 1:,}" if kind_of(Path(path)) in TABLES else f"byte {document.offset:,}"


def told(fault: dict[str, Any]) -> str:
    """A fault in words."""
    where = "".join(f", {unit} {fault[unit]:,}" for unit in ("line", "row", "byte") if unit in fault)
    return f"{fault['path']}{where}: {fault['reason']}, {fault['outcome']}"


def _sizes(path: Path) -> list[int]:
    """Bytes of the row groups of a Parquet file; none of one that cannot be read."""
    try:
        return Table(path).sizes
    except Unreadable:
        return []


def _line(file: BinaryIO) -> tuple[bytes, int]:
    """The next line, and its length; of one that is too long, the beginning."""
    line = file.readline(LONGEST_LINE)
    length, rest = len(line), line
    while len(rest) == LONGEST_LINE and not rest.endswith(b"\n"):
        rest = file.readline(LONGEST_LINE)
        length += len(rest)
    return line, length


def _no_text(first: bytes, is_known: bool) -> str:
    """What a file is, told by its first bytes, if that is no text; what its name calls text may hold zeros."""
    found = next((name for beginning, name in OTHERS if first.startswith(beginning)), "")
    if not found and not is_known and b"\0" in first and not _is_wide(first):
        found = "binary"
    return found and f"no text but {found}"


def _is_wide(first: bytes) -> bool:
    """Whether a text begins with the mark of UTF-16 or UTF-32."""
    return any(first.startswith(mark) for mark, encoding in MARKS if encoding != "utf-8")


def _first_bytes(path: Path) -> bytes:
    with Unpacked(path) as source:
        return next(iter(source), b"")


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
