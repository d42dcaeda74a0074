"""The record beside a model of which tokenizer it was trained with."""

import json
from pathlib import Path
from typing import Any

from ..errors import InputError
from ..files import write_atomically

RECORD = "tokenizer_record.json"


def write_record(folder: Path, file: str | None, fingerprint: str, named: dict[str, Any] | None = None) -> None:
    """Note which tokenizer belongs to a folder.

    Args:
        folder: of a model, a run or prepared text.
        file: of the tokenizer in it; None for bytes.
        fingerprint: of the tokenizer.
        named: what its file does not say: arguments of SubwordTokenizer.

    Raises:
        InputError: the folder cannot be written.
    """
    values = {"file": file, "fingerprint": fingerprint} | ({"named": named} if named else {})
    write_atomically(folder / RECORD, json.dumps(values) + "\n")


def read_record(folder: Path) -> dict[str, Any] | None:
    """What write_record noted; None in folders of older versions.

    Raises:
        InputError: truncated or altered.
    """
    try:
        return dict(json.loads((folder / RECORD).read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError):
        raise InputError(f"{folder / RECORD} cannot be read; it was truncated or altered") from None
