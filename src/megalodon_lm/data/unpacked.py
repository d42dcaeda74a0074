"""The bytes of a file, uncompressed on the way; of a damaged one, all that can be had before the damage."""

import io
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from ..errors import InputError
from .sources import STANDARD_INPUT, compression_of, stored

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK_BYTES = 1 << 16
ZSTD_BYTES = 1 << 14  # of a compressed file at a time, for there is no other limit on what comes out of it
ZSTD_WINDOW = 1 << 31  # bytes, as zstd --long=31 writes


class _Damaged(Exception):
    """Nothing comes after what was read."""


class Unpacked:
    """An open file, read once from its first byte; iterate over its blocks, or take it as a buffered file.

    Args:
        path: of the file; - is standard input.
        start: byte to begin at, of a file that is not compressed.

    Attributes:
        damage: why what comes next cannot be had, once that place is reached; empty while nothing is wrong.

    Raises:
        InputError: zstandard is not installed.
    """

    def __init__(self, path: Path, start: int = 0):
        self.path, self.start, self.damage = path, start, ""
        self._raw: IO[bytes] | None = None
        if compression_of(path) == ".zst":
            try:
                import zstandard  # noqa: F401
            except ImportError:
                raise InputError(f"{path} is compressed with zstd; install zstandard to read it") from None

    def __enter__(self) -> "Unpacked":
        return self

    def __exit__(self, *error: object) -> None:
        if self._raw is not None and self.path != STANDARD_INPUT:
            self._raw.close()
        self._raw = None

    def __iter__(self) -> Iterator[bytes]:
        try:
            self._raw = raw = stored(self.path)
            if self.start:
                raw.seek(self.start)
            unpack = {".gz": _of_gzip, ".zst": _of_zstd}.get(compression_of(self.path), blocks_of)
            yield from filter(None, unpack(raw))
        except _Damaged as error:
            self.damage = f"damaged from here on: {error}"
        except OSError as error:
            self.damage = f"cannot be read from here on: {error.strerror or error}"

    @property
    def position(self) -> int:
        """Bytes read of the file as it is stored; 0 where that is not known."""
        try:
            return self._raw.tell() if self._raw is not None else 0
        except OSError:
            return 0


class FileOfBlocks(io.RawIOBase):
    """Blocks of bytes as a file, for io.BufferedReader."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks, self._rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        """It is."""
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fill a buffer as far as one block goes."""
        while not self._rest:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._rest = memoryview(block)
        into = memoryview(buffer).cast("B")
        count = min(len(into), len(self._rest))
        into[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


def blocks_of(file: Any) -> Iterator[bytes]:
    """What a binary file gives, as it comes."""
    read = getattr(file, "read1", file.read)
    while block := read(BLOCK_BYTES):
        yield block


def _of_gzip(raw: Any) -> Iterator[bytes]:
    """As zcat: any number of members, zeros behind them, and of a damaged one all up to the damage."""
    data, members = raw.read(BLOCK_BYTES), 0
    while data:
        if members and not (data := data.lstrip(b"\0")):
            data = raw.read(BLOCK_BYTES)
            continue
        decoder = zlib.decompressobj(wbits=31)
        while not decoder.eof:
            before = decoder.copy()
            try:
                found = decoder.decompress(data, 16 * BLOCK_BYTES) if data else decoder.flush()
            except zlib.error as error:
                yield from _until_error(before, data, zlib.error)
                raise _Damaged(str(error)) from None
            if found:
                yield found
            if not data and not decoder.eof:
                raise _Damaged("the compressed data ends too early")
            data = decoder.unused_data if decoder.eof else decoder.unconsumed_tail or raw.read(BLOCK_BYTES)
        members += 1
        data = data or raw.read(BLOCK_BYTES)


def _of_zstd(raw: Any) -> Iterator[bytes]:
    """Any number of frames, and of a damaged one all whole blocks up to the damage."""
    from zstandard import ZstdDecompressor, ZstdError

    def decompressor() -> Any:
        return ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()

    data, start = raw.read(ZSTD_BYTES), 0
    while data:
        decoder, fed = decompressor(), 0
        while not decoder.eof:
            try:
                found = decoder.decompress(data)
            except ZstdError as error:
                yield from _again(raw, decompressor(), start, fed, data, ZstdError)
                raise _Damaged(str(error)) from None
            if found:
                yield found
            fed += len(data)
            if not decoder.eof and not (data := raw.read(ZSTD_BYTES)):
                raise _Damaged("the compressed data ends too early")
        start += fed - len(decoder.unused_data)
        data = decoder.unused_data or raw.read(ZSTD_BYTES)


def _again(raw: Any, decoder: Any, start: int, fed: int, data: bytes, error: type[Exception]) -> Iterator[bytes]:
    """Decompress the frame at `start` once more, for what comes out of `data` before the error in it."""
    if not raw.seekable():
        return
    raw.seek(start)
    while fed > 0:
        before = raw.read(min(fed, ZSTD_BYTES))
        decoder.decompress(before)
        fed -= len(before)
    yield from _until_error(decoder, data, error)


def _until_error(decoder: Any, data: bytes, error: type[Exception]) -> Iterator[bytes]:
    """What comes out of damaged data before the error, byte by byte."""
    with suppress(error):
        for at in range(len(data)):
            yield decoder.decompress(data[at : at + 1])
