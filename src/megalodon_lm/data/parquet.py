"""Rows of Parquet files; of damaged ones, those that can be had."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..errors import InputError

ROWS = 256  # read at a time


class Unreadable(Exception):
    """A file, or what is left of a row group, that cannot be read."""


class Table:
    """An open Parquet file.

    Args:
        path: of the file.

    Raises:
        InputError: pyarrow is not installed.
        Unreadable: the file is broken.
    """

    def __init__(self, path: Path):
        try:
            from pyarrow import ArrowException
            from pyarrow.parquet import ParquetFile
        except ImportError:
            raise InputError(f"{path} is a Parquet file; install pyarrow to read it") from None
        self._broken = (OSError, ArrowException, MemoryError)
        if path.is_fifo():  # which is opened twice, and waits for a writer each time
            raise Unreadable("a pipe, from which Parquet cannot be read; write it to a file first")
        try:
            self._file = ParquetFile(path, page_checksum_verification=True)
            self.columns: list[str] = self._file.schema_arrow.names
            groups = [self._file.metadata.row_group(i) for i in range(self._file.metadata.num_row_groups)]
        except self._broken as error:
            raise Unreadable(f"not readable as Parquet: {_line(error)}") from None
        self.rows = [group.num_rows for group in groups]
        """Of each row group."""
        self.sizes = [group.total_byte_size for group in groups]
        """Bytes of each row group."""

    def values(self, column: str, group: int, mended: Callable[[int], None]) -> Iterator[Any]:
        """A column of a row group.

        Args:
            column: its name.
            group: number of the row group.
            mended: called with the number of each row, within the group, that is not UTF-8; what is not is replaced.

        Raises:
            Unreadable: the rest of the row group is damaged.
        """
        row = 0
        batches = iter(())
        while True:
            try:
                if not row:
                    batches = self._file.iter_batches(ROWS, [group], columns=[column])
                batch = next(batches, None)
            except self._broken as error:
                raise Unreadable(f"damaged up to the end of row group {group + 1}: {_line(error)}") from None
            if batch is None:
                return
            try:
                yield from batch.column(0).to_pylist()
            except UnicodeDecodeError:
                for number, value in enumerate(batch.column(0), row):
                    yield _mended(value, number, mended)
            row += len(batch)


def _mended(value: Any, row: int, note: Callable[[int], None]) -> Any:
    """A value of which a text is not UTF-8: a text with replacements, anything else as none."""
    try:
        return value.as_py()
    except UnicodeDecodeError:
        note(row)
        raw = value.as_buffer() if hasattr(value, "as_buffer") else None
        return None if raw is None else raw.to_pybytes().decode("utf-8", "replace")


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
