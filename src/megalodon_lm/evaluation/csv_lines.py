"""CSV files whose fields may be whole documents."""

import csv
from pathlib import Path

from ..errors import InputError

LONGEST = (1 << 31) - 1  # characters of a field; by itself Python's reader stops at 131,072


def csv_lines(path: Path) -> list[list[str]]:
    """The fields of each line.

    Raises:
        InputError: it is not CSV in UTF-8.
        OSError: it cannot be read.
    """
    csv.field_size_limit(LONGEST)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.reader(file))
    except (csv.Error, UnicodeDecodeError) as error:
        raise InputError(f"{path} is no CSV in UTF-8: {error}") from None
